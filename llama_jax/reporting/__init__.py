"""Report on a run: progress bars, the log, `trainer_state.json`."""
