"""Tuning: tasks, candidates, the search for better schedules, and what measures them."""
