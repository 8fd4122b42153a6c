"""Prove that this program computes what torch and transformers compute, on a user's own model and data."""
