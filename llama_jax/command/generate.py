"""Answer with a model: a chat at the terminal, one prompt, or a file of them.

python -m llama_jax.generate --model_name_or_path HF_DIR
python -m llama_jax.generate --model_name_or_path HF_DIR --prompt "Name three fish."
python -m llama_jax.generate --model_name_or_path HF_DIR --input_file questions.jsonl --output_file answers.jsonl
"""

import argparse
import sys
from collections.abc import Sequence

import jax

from llama_jax.base.errors import InputError, Parser
from llama_jax.data.questions import Prompt, Prompts, read_questions
from llama_jax.hf.generation import check_new_tokens, read_sampling
from llama_jax.model.rope import covered_positions
from llama_jax.reporting.progress import count_bar, say
from llama_jax.run.answer_file import AnswerFile, answer_records, settings_of
from llama_jax.run.answering import STEP, Answerer, Rules
from llama_jax.run.chat import chat, printable
from llama_jax.run.loaded import Opened, add_model_flags, open_model

NEW_TOKENS, IN_CHAT = 128, 1024  # greatest numbers of tokens of an answer, where neither flag nor file gives one
BATCH_SIZE = 8
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
STDIN = "stdin"


def main(argv: list[str]) -> int:
    """Run the command; return its exit code. Raises InputError."""
    args = parse(argv)
    opened = open_model(args, "python -m llama_jax.generate")
    prompts = Prompts(opened.tokenizer, opened.check_tokens, args.raw)
    if args.input_file is not None:
        _answer_file(args, opened, prompts)
    elif (question := _question(args)) is not None:
        _answer_one(args, opened, prompts, *question)
    else:
        _chat(args, opened, prompts)
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the flags of the command, each alone and together checked. Raises InputError."""
    about = "Answer prompts. Without a prompt: a chat at the terminal, or the answer to what stdin holds."
    parser = Parser(prog="python -m llama_jax.generate", description=about)
    add_model_flags(parser)
    asked = parser.add_argument_group("what to answer").add_mutually_exclusive_group()
    asked.add_argument("--prompt", help="a text, in the chat template, or as an Alpaca instruction where there is none")
    asked.add_argument("--message", help="a user's message, in the tokenizer's chat template")
    asked.add_argument("--instruction", help="the instruction of an Alpaca prompt")
    asked.add_argument("--input_file", help="records with messages, instruction, prompt or text (docs/serving.md)")
    more = parser.add_argument_group("with these")
    more.add_argument("--raw", action="store_true", help="continue the text of a prompt, without any template")
    more.add_argument("--input", default="", help="the input that belongs to the instruction")
    more.add_argument("--output_file", help="JSONL: the records of the input file with their answers")
    more.add_argument("--batch_size", type=int, help=f"records of the input file at a time (default: {BATCH_SIZE})")
    how = parser.add_argument_group("how; what no flag gives, generation_config.json decides")
    how.add_argument("--max_new_tokens", type=int, help=f"tokens of an answer (default: {NEW_TOKENS}; chat: {IN_CHAT})")
    how.add_argument("--temperature", type=float, help="0 takes the likeliest token")
    how.add_argument("--top_k", type=int, help="draw from the k likeliest tokens; 0 for all")
    how.add_argument("--top_p", type=float, help="draw from the likeliest tokens that sum to p")
    how.add_argument("--min_p", type=float, help="draw from tokens of at least this share of the likeliest")
    how.add_argument("--repetition_penalty", type=float, help="above 1 makes tokens that are there already less likely")
    how.add_argument("--stop", nargs="+", metavar="TEXT", help="end an answer before the first of these texts")
    how.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    read_sampling({}, "", **{key: getattr(args, key) for key in SAMPLING})
    if args.max_new_tokens is not None:
        check_new_tokens(args.max_new_tokens, "--max_new_tokens")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed {args.seed} should be from 0 to {2**32 - 1}")
    if "" in (args.stop or []):
        raise InputError("--stop: an empty text ends every answer at once; leave it out")
    for name in ("prompt", "message", "instruction", "input", "stop"):
        try:
            "".join(getattr(args, name) or "").encode()
        except UnicodeEncodeError:  # Python keeps a byte that is no UTF-8 as half a surrogate pair
            raise InputError(f"--{name}: not UTF-8; give the text in UTF-8") from None
    if args.input and args.instruction is None:
        raise InputError("--input belongs to --instruction; put it into the --message or --prompt")
    if args.raw and (args.message is not None or args.instruction is not None):
        raise InputError("--raw continues a text: give it as --prompt")
    if (args.input_file is None) != (args.output_file is None):
        raise InputError("--input_file and --output_file go together; give both")
    if args.batch_size is not None and (args.input_file is None or args.batch_size < 1):
        raise InputError("--batch_size should be above 0, and belongs to --input_file")
    return args


def _question(args: argparse.Namespace) -> tuple[str, str] | None:
    """Return the flag of the question and its text; that of stdin where it is no terminal. None asks for a chat."""
    for name in ("prompt", "message", "instruction"):
        if getattr(args, name) is not None:
            return f"--{name}", getattr(args, name)
    if sys.stdin is not None and sys.stdin.isatty():
        if args.raw:
            raise InputError("--raw continues a text: give it as --prompt; a chat goes through the template")
        return None
    try:
        text = "" if sys.stdin is None else sys.stdin.read().rstrip("\r\n")
    except UnicodeDecodeError as e:
        raise InputError(f"{STDIN}: not UTF-8: {e.reason} at byte {e.start}") from None
    if not text:
        raise InputError(f"{STDIN} is no terminal and holds no text: give --prompt TEXT, or start a chat at a terminal")
    return STDIN, text


def _rules(args: argparse.Namespace, opened: Opened, new_tokens: int) -> Rules:
    """Return how answers are made, by the flags, else by the model's files. Raises InputError."""
    source = opened.source
    sampling, lines = source.sampling(**{key: getattr(args, key) for key in SAMPLING}, obeyed=["stop_strings"])
    stops = source.stops() if args.stop is None else args.stop
    for line in lines:
        say(line)
    return Rules(
        max_new_tokens=args.max_new_tokens or source.new_tokens() or new_tokens,
        ends=source.end_ids(opened.tokenizer.eos_token_id),
        stops=tuple(stops),
        sampling=sampling,
        seed=args.seed,
    )


def _answer_one(args: argparse.Namespace, opened: Opened, prompts: Prompts, flag: str, text: str) -> None:
    """Print the answer to one question, and nothing else, on stdout."""
    if flag == "--message":
        prompt = prompts.of_chat([{"role": "user", "content": text}], flag)
    elif flag == "--instruction":
        prompt = prompts.of_instruction({"instruction": text, "input": args.input}, flag)
    else:
        if prompts.chat is None and not args.raw:
            say("the tokenizer has no chat template: the prompt is an Alpaca instruction; --raw continues its text")
        prompt = prompts.of_prompt(text, flag)
    rules = _rules(args, opened, NEW_TOKENS)
    _check_length(opened, [prompt], rules, 1)
    answerer = Answerer(opened.load(), opened.tokenizer, rules)
    is_seen = sys.stdout.isatty()
    with jax.set_mesh(opened.mesh):
        answer = answerer.stream(prompt, step=1 if is_seen else STEP)
        for piece in answer:
            print(printable(piece) if is_seen else piece, end="", flush=True)
    print()
    if answer.cut:
        say(f"(cut at --max_new_tokens {rules.max_new_tokens:,})")


def _answer_file(args: argparse.Namespace, opened: Opened, prompts: Prompts) -> None:
    """Answer the records of a file. All are checked before the model is loaded."""
    output, records = AnswerFile(args.output_file), read_questions(args.input_file, say)
    rules = _rules(args, opened, NEW_TOKENS)
    with count_bar("reading", len(records), "record") as bar:
        made = prompts.of_records(records, bar.update)
    rows = min(args.batch_size or BATCH_SIZE, len(made))
    _check_length(opened, made, rules, rows)
    names = ("model_name_or_path", "adapter_name_or_path", "tokenizer_name", "bf16")
    bits = [name for name in ("load_in_8bit", "load_in_4bit") if getattr(args, name)]  # absent before 2026-11-29
    model = {name: getattr(args, name) for name in (*names, *bits)}
    output.begin(settings_of(model, made, rules), len(made))
    answerer = Answerer(opened.load(), opened.tokenizer, rules)
    with jax.set_mesh(opened.mesh):
        answer_records(answerer, records, made, output, rows)


def _chat(args: argparse.Namespace, opened: Opened, prompts: Prompts) -> None:
    """Talk at the terminal. The template is tried before the model is loaded."""
    if prompts.chat is None:
        say("the tokenizer has no chat template: each question is an Alpaca instruction of its own, without history")
    else:
        prompts.of_chat([{"role": "user", "content": "Hi"}], "a chat")
    rules = _rules(args, opened, IN_CHAT)
    answerer = Answerer(opened.load(), opened.tokenizer, rules)
    with jax.set_mesh(opened.mesh):
        chat(answerer, prompts, covered_positions(opened.source.config))


def _check_length(opened: Opened, prompts: Sequence[Prompt], rules: Rules, rows: int) -> None:
    """Say where a prompt and its answer may be longer than the model was made for. Raises InputError where `rows` of
    them at a time do not fit memory."""
    covered = covered_positions(opened.source.config)
    longest = max(len(prompt.ids) for prompt in prompts)
    opened.check_memory(rows, longest + rules.max_new_tokens)
    if longest + rules.max_new_tokens > covered:
        lengths = f"the prompt's {longest:,} tokens and --max_new_tokens {rules.max_new_tokens:,}"
        which = "" if len(prompts) == 1 else "of the longest record, "
        pass_it = f"pass the {covered:,} positions of the model (max_position_embeddings)"
        say(f"warning: {which}{lengths} {pass_it}: text past them is poor; shorten one of the two")
