"""Read and write Hugging Face folders: no other folder knows HF's tensor names."""
