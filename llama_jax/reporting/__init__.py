"""What a run says: the progress bar, the log, `trainer_state.json`."""
