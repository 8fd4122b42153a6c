"""Judge a model by lm-eval's tasks, or by the perplexity of a text.

python -m llama_jax.evaluate --model_name_or_path HF_DIR --tasks arc_easy,hellaswag
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.base.errors import InputError, Parser
from llama_jax.data.chat import Chat
from llama_jax.data.tokenizer import read_text
from llama_jax.reporting.progress import say
from llama_jax.run import tasks
from llama_jax.run.loaded import Opened, add_model_flags, open_model
from llama_jax.run.scoring import Scorer, perplexity, prefix_token, rolling_windows

if TYPE_CHECKING:
    from llama_jax.run.judging import Judge

TEXT_BYTES = 256 << 20


def main(argv: list[str]) -> int:
    """Run the command; return its exit code. Raises InputError."""
    parser = Parser(prog="python -m llama_jax.evaluate", description="Judge a model by lm-eval's tasks, or by a text.")
    add_model_flags(parser)
    parser.add_argument("--tasks", nargs="+", default=[], help="names of lm-eval, patterns or YAML files; with commas")
    parser.add_argument("--perplexity_file", help="text file (UTF-8) whose perplexity is printed; without lm-eval")
    parser.add_argument("--num_fewshot", type=int, help="examples before a question; by default as the task has it")
    parser.add_argument("--limit", type=float, help="questions of a task; below 1 a share")
    parser.add_argument("--batch_size", default="auto", help="rows of the longest length at once, or auto")
    parser.add_argument("--max_length", type=int, help="tokens of a request; by default the model's positions")
    parser.add_argument("--output_path", help="folder or .json file for lm-eval's results")
    parser.add_argument("--apply_chat_template", action="store_true", help="ask in the tokenizer's chat template")
    parser.add_argument("--include_path", help="folder with YAML files of further tasks")
    args = parser.parse_args(argv)
    rows = None if args.batch_size == "auto" else _count(args.batch_size, "--batch_size")
    if not args.tasks and not args.perplexity_file:
        raise InputError("give --tasks, as arc_easy, or --perplexity_file with a text")
    if args.limit is not None and not (0 < args.limit < 1 or (args.limit >= 1 and args.limit == int(args.limit))):
        raise InputError(f"--limit {args.limit:g}: should be a whole number, or a share below 1")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise InputError(f"--num_fewshot {args.num_fewshot}: should not be below 0")
    for flag in ("output_path", "num_fewshot", "limit", "include_path", "apply_chat_template"):
        if not args.tasks and getattr(args, flag) not in (None, False):
            raise InputError(f"--{flag}: is for --tasks, which is not given")
    opened = open_model(args, "python -m llama_jax.evaluate")
    text = _read(args.perplexity_file) if args.perplexity_file else None
    if args.tasks:
        tasks.check_installed("--tasks")
    covered = opened.config.max_position_embeddings
    if args.max_length is not None and not 1 < args.max_length <= covered:
        raise InputError(f"--max_length {args.max_length}: should be from 2 to the model's {covered:,} positions")
    scorer = _scorer(opened, args.max_length, rows)
    loaded = tasks.load_tasks(tasks.split_names(args.tasks), "--tasks", args.include_path) if args.tasks else None
    if text is not None:
        (ids,) = opened.tokenizer.encode_batch([text])
        pairs = [*rolling_windows(ids, prefix_token(opened.tokenizer), scorer.max_length)]
        scorer.check(pairs)
    judge = _judge(opened, scorer, rows, args.apply_chat_template, *loaded) if loaded else None
    params = opened.load_params()
    if text is not None:
        loglikelihood = math.fsum(score.loglikelihood for score in scorer(params, pairs))
        say(f"{args.perplexity_file}: {len(ids):,} tokens in windows of {scorer.max_length:,}")
        for name, value in perplexity(loglikelihood, text, len(ids)).items():
            print(f"{name:<16} {value:.6g}")
    if judge is not None and loaded is not None:
        from lm_eval.utils import make_table

        judge.params = lambda: params
        results = tasks.run_tasks(
            judge,
            *loaded,
            model=args.model_name_or_path,
            output_path=args.output_path,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            batch_size=args.batch_size,
            apply_chat_template=args.apply_chat_template,
        )
        print(make_table(results))
        if "groups" in results:
            print(make_table(results, "groups"))
    return 0


def _read(path: str) -> str:
    """Return the text of a file. Raises InputError."""
    text = read_text(Path(path), TEXT_BYTES)
    if not text.strip():
        raise InputError(f"--perplexity_file {path}: holds no text")
    return text


def _count(text: str, flag: str) -> int:
    """Return the number above 0 in a flag. Raises InputError."""
    if not text.isdecimal() or not int(text):
        raise InputError(f"{flag} {text}: should be auto or a number above 0")
    return int(text)


def _judge(opened: Opened, scorer: Scorer, rows: int | None, chats: bool, manager: Any, items: list[Any]) -> "Judge":
    """Return lm-eval's model, with the tasks' requirements checked. Raises InputError."""
    from llama_jax.run.judging import Judge  # needs lm-eval

    if chats:
        Chat(opened.tokenizer)
    judge = Judge(opened.tokenizer, opened.source, scorer, opened.run, opened.mesh, rows=rows)
    judge.check_tasks(manager.load(items)["tasks"].values())
    return judge


def _scorer(opened: Opened, max_length: int | None, rows: int | None) -> Scorer:
    """Return the scorer of a model, with the device's best attention kernel."""
    kernel = opened.run.attention.name
    return Scorer(opened.config, opened.run, opened.mesh, kernel, max_length=max_length, rows=rows)
