"""Answer one prompt: parse the flags, load the model, print its answer.

python -m llama_jax.generate --model_name_or_path HF_DIR --instruction "Name three fish."
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.base.bucket import as_path
from llama_jax.base.errors import InputError, Parser
from llama_jax.data.chat import Chat
from llama_jax.data.examples import alpaca_prompt
from llama_jax.data.tokenizer import open_tokenizer
from llama_jax.distributed import sharding
from llama_jax.distributed.platform import set_up_jax
from llama_jax.distributed.processes import refuse_several
from llama_jax.hf import peft
from llama_jax.hf.source import Source
from llama_jax.hf.tensor import Tensor
from llama_jax.model.definition import define, merge
from llama_jax.model.generate import generate
from llama_jax.model.llama import RunOptions
from llama_jax.model.rope import covered_positions
from llama_jax.reporting.progress import say


def main(argv: list[str]) -> int:
    """Run the command; return its exit code. Raises InputError."""
    parser = Parser(prog="python -m llama_jax.generate", description="Answer one instruction, or one message.")
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--adapter_name_or_path", help="PEFT folder of an adapter of this model")
    parser.add_argument("--tokenizer_name", help="folder or hub name of another tokenizer than the model's own")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--instruction", help="the instruction of an Alpaca prompt")
    asked.add_argument("--message", help="a user's message, in the tokenizer's chat template")
    parser.add_argument("--input", default="", help="the input that belongs to the instruction")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, help="0 is greedy; by default as generation_config.json has it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--allow_pickle", action="store_true", help="read pytorch_model*.bin (torch >= 2.10)")
    parser.add_argument("--mesh", help="the layout of all devices, as tensor=4; the default is one device")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1 or not 0 <= (args.temperature or 0) < math.inf:
        raise InputError("--max_new_tokens should be above 0, --temperature 0 or above")
    if args.message is not None and args.input:
        raise InputError("--input belongs to --instruction; put it into the --message")
    refuse_several("python -m llama_jax.generate")
    set_up_jax(args.use_cpu)
    source = Source(args.model_name_or_path, args.allow_pickle, tokenizer=args.tokenizer_name)
    for note in source.notes:
        say(note)
    tokenizer = open_tokenizer(source.tokenizer_folder)
    mesh = sharding.make_mesh(None if args.mesh else jax.devices()[:1], args.mesh or "auto")
    if sharding.batch_ways(mesh) * sharding.row_ways(mesh) > 1:
        raise InputError(f"--mesh {args.mesh}: a prompt can be divided over tensor only; give --mesh tensor=-1")
    dtype = jnp.dtype(jnp.bfloat16 if args.bf16 else jnp.float32)
    lora, tensors, config = None, dict[str, Tensor](), source.config
    if args.adapter_name_or_path:
        adapter, tensors = peft.read_adapter(as_path(args.adapter_name_or_path), config)
        lora, config = adapter.lora, adapter.resized(config)
    layers = source.config.num_hidden_layers
    scan_layers = layers > 8 and (lora is None or lora.uniform(layers))
    run = RunOptions(param_dtype=dtype, scan_layers=scan_layers, lora=lora)
    if args.message is None:
        prompt = tokenizer.encode_batch([alpaca_prompt({"instruction": args.instruction, "input": args.input})])[0]
    else:
        prompt = Chat(tokenizer).prompt([{"role": "user", "content": args.message}], "--message")
    if max(prompt) >= source.config.vocab_size:
        past = f"the tokenizer has tokens past the embedding's {source.config.vocab_size} rows"
        raise InputError(f"{tokenizer.folder}: {past}; use the model's own tokenizer")
    if len(prompt) + args.max_new_tokens > (covered := covered_positions(source.config)):
        lengths = f"the prompt's {len(prompt):,} tokens and --max_new_tokens {args.max_new_tokens:,}"
        pass_it = f"pass the {covered:,} positions of the model (max_position_embeddings)"
        say(f"warning: {lengths} {pass_it}: text past them is poor; shorten one of the two")
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ends = sorted({*source.eos_token_ids(), *own})
    sampling, lines = source.sampling(args.temperature)
    for line in lines:
        say(line)
    definition = define(config, run, mesh)
    trained, rest = peft.load_adapter(tensors, lora, config, definition.params) if lora else ({}, definition.params)
    params = merge(source.load(run, mesh, like=rest), trained)
    with jax.set_mesh(mesh):
        model = nnx.merge(definition.graphdef, params)
        (new,) = generate(model, [prompt], args.max_new_tokens, ends, sampling, args.seed)
    print(tokenizer.decode(new).strip())
    return 0
