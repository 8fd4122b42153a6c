"""Answering: prefill, then decode token by token with a KV cache.

    python -m llama_jax.generate --model_name_or_path DIR --instruction "Name three fish."

Letters: B rows, T tokens of a prompt, S slots of the cache, N new tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llama_jax.base.errors import InputError, Parser
from llama_jax.base.files import read_json_object
from llama_jax.data.chat import Chat
from llama_jax.data.examples import alpaca_prompt
from llama_jax.data.tokenizer import Tokenizer, open_tokenizer
from llama_jax.distributed import sharding
from llama_jax.distributed.platform import set_up_jax
from llama_jax.hf.source import Source
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define
from llama_jax.model.llama import RunOptions, make_cache

SLOT_MULTIPLE = 128  # prompts are padded to it, so that few lengths are compiled


def generate(
    params: Any,
    config: LlamaConfig,
    run: RunOptions,
    mesh: Mesh,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_token_ids: Sequence[int] = (),
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """The new tokens of each prompt (ids, beginning token included), the end token left out.

    Greedy at temperature 0; otherwise drawn from softmax(logits / temperature).
    """
    graphdef = define(config, run, mesh).graphdef
    B, longest = len(prompts), max(map(len, prompts))
    T = -(-longest // SLOT_MULTIPLE) * SLOT_MULTIPLE
    S = T + -(-max_new_tokens // SLOT_MULTIPLE) * SLOT_MULTIPLE
    ids = np.zeros((B, T), np.int32)
    positions = np.full((B, T), S, np.int32)  # past the cache: what stands there is dropped
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
        positions[row, : len(prompt)] = np.arange(len(prompt))
    sizes = np.asarray([len(p) for p in prompts], np.int32)
    static = (graphdef, config, run, max_new_tokens, tuple(eos_token_ids), temperature, S)
    with jax.set_mesh(mesh):
        arrays = (sharding.put(mesh, a) for a in (ids, positions, sizes))
        new = np.asarray(jax.device_get(_generate(*static, params, *arrays, jax.random.key(seed))))
    rows = []
    for row in new.tolist():
        ends = [i for i, token in enumerate(row) if token in eos_token_ids]
        rows.append(row[: ends[0]] if ends else row)
    return rows


@partial(jax.jit, static_argnums=range(7))
def _generate(graphdef, config, run, N, eos, temperature, S, params, ids_BT, positions_BT, sizes_B, key):
    model = nnx.merge(graphdef, params)
    B = ids_BT.shape[0]
    cache = make_cache(config, run, B, S)
    segments = jnp.ones_like(ids_BT)
    hidden, cache = model(ids_BT, positions_BT, segments, jnp.zeros_like(ids_BT) + jnp.max(sizes_B), cache)
    is_last = jnp.arange(ids_BT.shape[1]) == (sizes_B - 1)[:, None]
    last = jnp.sum(jnp.where(is_last[..., None], hidden, 0), axis=1, keepdims=True)

    def choose(hidden_B1D, key):
        logits_BV = model.logits(hidden_B1D)[:, 0]
        if temperature <= 0:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, logits_BV / temperature).astype(jnp.int32)

    def unfinished(carry):
        n, _, _, done_B, _, _ = carry
        return (n < N) & ~jnp.all(done_B)

    def one(carry):
        n, token_B, new_BN, done_B, cache, key = carry
        new_BN = jnp.where(jnp.arange(N) == n, token_B[:, None], new_BN)
        done_B = done_B | jnp.isin(token_B, jnp.asarray(eos, jnp.int32))
        position_B1 = (sizes_B + n)[:, None]
        hidden, cache = model(token_B[:, None], position_B1, jnp.ones_like(position_B1), position_B1 + 1, cache)
        key, sub = jax.random.split(key)
        return n + 1, choose(hidden, sub), new_BN, done_B, cache, key

    key, sub = jax.random.split(key)
    new_BN = jnp.full((B, N), eos[0] if eos else 0, jnp.int32, out_sharding=sharding.ACT_BT)
    start = (jnp.int32(0), choose(last, sub), new_BN, jnp.zeros_like(sizes_B, dtype=bool), cache, key)
    return jax.lax.while_loop(unfinished, one, start)[2]


def eos_token_ids(folder: Path, raw: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """The end tokens: those of `generation_config.json` or `config.json`, and the tokenizer's. Raises InputError."""
    path = folder / "generation_config.json"
    where = path if path.exists() else folder / "config.json"
    configured = (read_json_object(path) if path.exists() else raw).get("eos_token_id")
    ids = [i for i in (configured if isinstance(configured, list) else [configured]) if i is not None]
    if not all(type(i) is int for i in ids):
        raise InputError(f"{where}: eos_token_id {configured!r} should be a token's id or a list of ids")
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m llama_jax.generate", description="Answer one instruction, or one message.")
    parser.add_argument("--model_name_or_path", required=True)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--instruction", help="in Alpaca's words")
    asked.add_argument("--message", help="of a user, by the tokenizer's chat template")
    parser.add_argument("--input", default="", help="of the instruction")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--allow_pickle", action="store_true", help="read pytorch_model*.bin (torch >= 2.10)")
    parser.add_argument("--mesh", help="how all devices are laid out, as tensor=4; by default one device is used")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1 or not 0 <= args.temperature < math.inf:
        raise InputError("--max_new_tokens should be above 0, --temperature a number not below")
    if args.message is not None and args.input:
        raise InputError("--input belongs to --instruction; put it into the --message")
    set_up_jax(args.use_cpu)
    source = Source(Path(args.model_name_or_path), args.allow_pickle)
    tokenizer = open_tokenizer(source.tokenizer_folder)
    mesh = sharding.make_mesh(None if args.mesh else jax.devices()[:1], args.mesh or "auto")
    if sharding.batch_ways(mesh) * sharding.row_ways(mesh) > 1:
        raise InputError(f"--mesh {args.mesh}: one prompt has one row, which only tensor divides; as tensor=-1")
    dtype = jnp.dtype(jnp.bfloat16 if args.bf16 else jnp.float32)
    run = RunOptions(param_dtype=dtype, scan_layers=source.config.num_hidden_layers > 8)
    if args.message is None:
        prompt = tokenizer.encode_batch([alpaca_prompt({"instruction": args.instruction, "input": args.input})])[0]
    else:
        prompt = Chat(tokenizer).prompt([{"role": "user", "content": args.message}], "--message")
    if max(prompt) >= source.config.vocab_size:
        raise InputError(f"{tokenizer.folder}: the tokenizer has more tokens than the model's embedding has rows")
    new = generate(
        source.load(run, mesh), source.config, run, mesh, [prompt], args.max_new_tokens,
        eos_token_ids(source.folder, source.raw, tokenizer), args.temperature, args.seed,
    )  # fmt: skip
    print(tokenizer.decode(new[0]).strip())
    return 0
