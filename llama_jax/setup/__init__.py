"""Read flags, and make a job of flags, model and data."""
