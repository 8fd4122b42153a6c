"""Hugging Face folders: the only rooms that know HF's tensor names."""
