"""Run `train_jax.py`: parse the flags, then plan a dry run, explain, or train."""

import time

from llama_jax.base.stopping import Stopping
from llama_jax.setup.arguments import Arguments, parse_arguments


def main(argv: list[str]) -> int:
    """Run the command and return its exit code. Raises InputError."""
    started = time.monotonic()
    with Stopping() as stopping:
        return run(parse_arguments(argv), stopping, started)


def run(args: Arguments, stopping: Stopping, started: float) -> int:
    """Run the command by its flags and return its exit code. Raises InputError."""
    # JAX is imported once the flags are good: its platform may be one of them.
    if args.dry_run is not None:  # "" too, as of a shell variable that is not set
        from llama_jax.plan.dry_run import dry_run

        return dry_run(args)
    from llama_jax.distributed import processes
    from llama_jax.run import trainer

    with processes.failing_alone():
        if args.explain:
            return trainer.print_explanation(args)
        return trainer.export_only(args, stopping) if args.export_only else trainer.train(args, stopping, started)
