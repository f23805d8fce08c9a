"""What runs a compiled model and measures it; needs no torch."""
