"""Flags, and the job that flags, model and data make."""
