"""Answer one prompt: parse the flags, load the model, print its answer.

python -m llama_jax.generate --model_name_or_path HF_DIR --instruction "Name three fish."
"""

import math

import jax

from llama_jax.base.errors import InputError, Parser
from llama_jax.data.chat import Chat
from llama_jax.data.examples import alpaca_prompt
from llama_jax.model.generate import generate
from llama_jax.model.rope import covered_positions
from llama_jax.reporting.progress import say
from llama_jax.run.loaded import add_model_flags, open_model


def main(argv: list[str]) -> int:
    """Run the command; return its exit code. Raises InputError."""
    parser = Parser(prog="python -m llama_jax.generate", description="Answer one instruction, or one message.")
    add_model_flags(parser)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--instruction", help="the instruction of an Alpaca prompt")
    asked.add_argument("--message", help="a user's message, in the tokenizer's chat template")
    parser.add_argument("--input", default="", help="the input that belongs to the instruction")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, help="0 is greedy; by default as generation_config.json has it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1 or not 0 <= (args.temperature or 0) < math.inf:
        raise InputError("--max_new_tokens should be above 0, --temperature 0 or above")
    if args.message is not None and args.input:
        raise InputError("--input belongs to --instruction; put it into the --message")
    opened = open_model(args, "python -m llama_jax.generate")
    source, tokenizer = opened.source, opened.tokenizer
    if args.message is None:
        prompt = tokenizer.encode_batch([alpaca_prompt({"instruction": args.instruction, "input": args.input})])[0]
    else:
        prompt = Chat(tokenizer).prompt([{"role": "user", "content": args.message}], "--message")
    opened.check_tokens(prompt)
    if len(prompt) + args.max_new_tokens > (covered := covered_positions(source.config)):
        lengths = f"the prompt's {len(prompt):,} tokens and --max_new_tokens {args.max_new_tokens:,}"
        pass_it = f"pass the {covered:,} positions of the model (max_position_embeddings)"
        say(f"warning: {lengths} {pass_it}: text past them is poor; shorten one of the two")
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ends = sorted({*source.eos_token_ids(), *own})
    sampling, lines = source.sampling(args.temperature)
    for line in lines:
        say(line)
    model = opened.load()
    with jax.set_mesh(opened.mesh):
        (new,) = generate(model, [prompt], args.max_new_tokens, ends, sampling, args.seed)
    print(tokenizer.decode(new).strip())
    return 0
