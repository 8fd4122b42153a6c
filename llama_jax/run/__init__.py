"""Make a run from start to end."""
