"""The run of `benchmarks/golden_run.py` by the real Trainer on the CPU, kept for machines that have no torch.

    .venv/bin/python tests/golden_full.py

writes tests/golden/full.json: loss, gradient norm and learning rate of every update, in float32.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from golden_run import GOLDEN, TRAINER, write_inputs
from hf_trainer import Server
from tiny import write_json


def main() -> None:
    server = Server("5")
    with tempfile.TemporaryDirectory() as directory:
        model, data = write_inputs(Path(directory))
        spec = {"model": str(model), "data": str(data), "output_dir": str(Path(directory) / "out"), "attn": "eager"}
        done = server.train(spec | {"argv": TRAINER.split()})
    if "error" in done:
        sys.exit(done["error"])
    kept = {key: done[key] for key in ("losses", "grad_norms", "rates")}
    write_json(GOLDEN, {"versions": server.versions, **kept})
    server.close()


if __name__ == "__main__":
    main()
