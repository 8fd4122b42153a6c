"""What every other folder may use: the user's mistakes and files."""
