"""Read and write files, and report a user's mistakes: used by every other folder."""
