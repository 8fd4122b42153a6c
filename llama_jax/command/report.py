"""Make the page of finished runs: their curves laid over each other in one HTML file.

python -m llama_jax.report OUTPUT_DIR OTHER_DIR --output_file both.html
"""

import argparse
from pathlib import Path

from llama_jax.base.bucket import as_path, reaching
from llama_jax.base.errors import Parser
from llama_jax.base.files import write_text
from llama_jax.reporting.comparison import read_other
from llama_jax.reporting.page import as_page
from llama_jax.reporting.run_report import PAGE, read_report


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse a command line. Raises InputError."""
    parser = Parser(prog="python -m llama_jax.report", description="Make a page of one run or several.")
    parser.add_argument("output_dirs", nargs="+", metavar="OUTPUT_DIR", help="of train_jax.py, or of the HF Trainer")
    parser.add_argument("--output_file", help=f"by default {PAGE}: in the folder of a single run, else here")
    parser.add_argument("--compare_with", metavar="trainer_state.json", help="log to lay over that of the first run")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Run the command; return its exit code. Raises InputError."""
    args = parse(argv)
    runs = [read_report(as_path(folder)) for folder in args.output_dirs]
    if args.compare_with:
        runs[0]["compare"] = read_other(args.compare_with)
    names = [run["name"] for run in runs]
    for run, given in zip(runs, args.output_dirs, strict=True):
        if names.count(run["name"]) > 1:
            run["name"] = given
    folder = as_path(args.output_dirs[0]) if len(runs) == 1 else Path()
    file = as_path(args.output_file) if args.output_file else folder / PAGE
    with reaching(file, f"{file} cannot be written"):
        write_text(file, as_page(runs))
    print(file)
    return 0
