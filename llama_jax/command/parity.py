"""Prove on a model, data and flags that this program computes what torch and transformers compute.

python -m llama_jax.parity --model_name_or_path HF_DIR --data_path data.json --bf16 True
python -m llama_jax.parity --verify OUTPUT_DIR
"""

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llama_jax.base.bucket import as_path, is_remote
from llama_jax.base.errors import InputError, Parser
from llama_jax.base.files import make_output_dir
from llama_jax.base.stopping import STOPPED
from llama_jax.reporting.progress import say
from llama_jax.setup.arguments import Arguments, parse_arguments

VERIFY = "--verify"
ABOUT = (
    "Prove that this program computes what torch and transformers compute, on a model, its data and the flags of a "
    "run: tokens, forward pass, loss and gradients, and updates beside the real Trainer. Takes the flags of "
    "train_jax.py (train_jax.py --help), writes parity.json and parity.html into --output_dir, and exits with 0 only "
    "where every row holds."
)


class Verified(NamedTuple):
    """Hold a command line of `--verify`: the folder, the place of an adapter's base model, None for its own, and
    whether its weights may be pickled."""

    folder: Path
    base: str | None
    allow_pickle: bool


class Parsed(NamedTuple):
    """Hold a command line: the run's flags, and this command's own."""

    args: Arguments
    records: int
    updates: int
    shrink: int | None
    against: str | None


def parse_verify(argv: Sequence[str]) -> Verified:
    """Parse a command line with `--verify`. Raises InputError."""
    parser = Parser(prog="python -m llama_jax.parity", description=ABOUT, allow_abbrev=False)
    parser.add_argument(VERIFY, metavar="OUTPUT_DIR", required=True, action="append")
    parser.add_argument("--model_name_or_path", help="an adapter's base model, by default as the run had it")
    parser.add_argument(
        "--allow_pickle",
        nargs="?",
        const="True",
        default="False",
        choices=["True", "False"],
        help="read a base model of pytorch_model*.bin",
    )
    given, rest = parser.parse_known_args(list(argv))
    if rest:
        raise InputError(f"{rest[0]}: has no meaning with {VERIFY}, which needs the folder alone; leave it out")
    if len(given.verify) > 1 or not given.verify[0]:
        raise InputError(f"{VERIFY}: takes one folder at a time; give {VERIFY} OUTPUT_DIR once")
    folder = as_path(given.verify[0])
    if is_remote(folder):
        raise InputError(f"{VERIFY} {folder}: a local folder is verified; copy it here")
    return Verified(folder, given.model_name_or_path, given.allow_pickle == "True")


def parse(argv: Sequence[str]) -> Parsed | Verified:
    """Parse a command line. Raises InputError."""
    if any(word.partition("=")[0] == VERIFY for word in argv):
        return parse_verify(argv)
    parser = Parser(prog="python -m llama_jax.parity", description=ABOUT, allow_abbrev=False)
    parser.add_argument("--records", type=int, help="records whose tokens are compared, by default 32")
    parser.add_argument("--updates", type=int, help="updates to make beside the Trainer, by default 3; 0: none")
    parser.add_argument("--shrink", type=int, metavar="LAYERS", help="compare the first layers of the model only")
    parser.add_argument("--against", metavar="DIR2", help="compare with this folder instead of torch")
    parser.add_argument(VERIFY, metavar="OUTPUT_DIR", help="verify a copied folder by its manifest.json, nothing else")
    own, rest = parser.parse_known_args(list(argv))
    args = parse_arguments(rest)
    for name in ("records", "updates") if own.against else ():
        if getattr(own, name):
            raise InputError(f"--{name}: does not go with --against, which compares weights and logits; leave it out")
    records, updates = (32 if own.records is None else own.records), (3 if own.updates is None else own.updates)
    if records < 1:
        raise InputError(f"--records {records}: should be a number above 0")
    if updates < 0:
        raise InputError(f"--updates {updates}: should be a number of updates, or 0 for none")
    for name in ("dry_run", "explain", "export_only", "resume_from_checkpoint"):
        if getattr(args, name):
            raise InputError(f"--{name}: is for train_jax.py; leave it out")
    return Parsed(args, records, updates, own.shrink, own.against)


def main(argv: list[str]) -> int:
    """Run the command; return its exit code: 0 where every row holds, 1 where one fails. Raises InputError."""
    started = time.monotonic()
    given = parse(argv)
    if isinstance(given, Verified):
        return _verify(given, started)
    from llama_jax.proof.certify import certify, certify_against, open_subject
    from llama_jax.proof.torch_layers import import_torch
    from llama_jax.proof.verdict import PAGE, Row, table

    def show(rows: Sequence[Row]) -> None:
        print(f"{rows[0].section}\n{table(rows)}", flush=True)

    folder = as_path(given.args.output_dir)
    if is_remote(folder):
        raise InputError(f"--output_dir {folder}: a certificate is written to a local folder; give one")
    if given.against is None:
        import_torch()
    make_output_dir(folder)
    # As at Ctrl-C: programs that this one has started end, and its temporary folder goes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    subject = open_subject(given.args, given.shrink)
    if given.against is None:
        certificate = certify(subject, argv, given.records, given.updates, show)
    else:
        certificate = certify_against(subject, given.against, argv, show)
    certificate.write(folder)
    print(certificate.verdict())
    say(f"{folder / PAGE}: written after {time.monotonic() - started:.0f} s")
    return 1 if certificate.failed else 0


def _verify(given: Verified, started: float) -> int:
    """Verify a folder; return the exit code."""
    from llama_jax.proof.verdict import Row, table, verdict_of
    from llama_jax.proof.verify import verify

    def show(rows: Sequence[Row]) -> None:
        print(f"{rows[0].section}\n{table(rows, most=len(rows))}", flush=True)

    rows = verify(given.folder, given.base, given.allow_pickle, show)
    print(verdict_of(rows))
    say(f"{given.folder}: verified in {time.monotonic() - started:.0f} s")
    return 1 if any(row.holds is False for row in rows) else 0
