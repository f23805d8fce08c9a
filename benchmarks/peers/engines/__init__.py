"""One file for each engine; what is here is found by itself."""
