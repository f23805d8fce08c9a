"""Tuning: design spaces, candidates, and what runs and ranks them."""
