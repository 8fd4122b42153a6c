"""List the metrics of an evaluation, by the HF Trainer's names."""

EVALUATION_METRICS = ("eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
