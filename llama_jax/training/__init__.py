"""Define the train state, one update, optimizers, schedules and the loss."""
