"""Open and load a model for a command that uses it: its weights, an adapter, its tokenizer."""

import argparse
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from llama_jax.base.bucket import as_path
from llama_jax.base.errors import InputError
from llama_jax.data.tokenizer import Tokenizer, open_tokenizer
from llama_jax.distributed import sharding
from llama_jax.distributed.platform import memory_use, set_up_jax
from llama_jax.distributed.processes import refuse_several
from llama_jax.hf import peft
from llama_jax.hf.source import Source
from llama_jax.hf.tensor import Tensor
from llama_jax.model.attention import Kernel, choose_kernel
from llama_jax.model.cache import make_cache
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define, merge
from llama_jax.model.llama import Llama, RunOptions
from llama_jax.model.quantized import Quantization
from llama_jax.model.roles import Params
from llama_jax.plan.planner import unrolled_layers
from llama_jax.reporting.progress import byte_bar, say
from llama_jax.run.disk import size


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `open_model` reads."""
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--adapter_name_or_path", help="PEFT folder of an adapter of this model")
    parser.add_argument("--tokenizer_name", help="folder or hub name of another tokenizer than the model's own")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--load_in_8bit", action="store_true", help="keep the projections in 8 bits (int8)")
    bits.add_argument("--load_in_4bit", action="store_true", help="keep the projections in 4 bits (NF4)")
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--allow_pickle", action="store_true", help="read pytorch_model*.bin")
    parser.add_argument("--mesh", help="the layout of all devices, as tensor=4; the default is one device")


@dataclass(frozen=True)
class Opened:
    """Hold a model whose files are checked and whose weights are not read yet. `config` has the rows of the adapter."""

    source: Source
    tokenizer: Tokenizer
    config: LlamaConfig
    mesh: Mesh
    run: RunOptions
    adapter: dict[str, Tensor]

    def load(self) -> Llama:
        """Read the weights and return the model on the devices of the mesh. Raises InputError."""
        return nnx.merge(define(self.config, self.run, self.mesh).graphdef, self.load_params())

    def load_params(self) -> Params:
        """Read the weights and return the parameters on the devices of the mesh. Raises InputError."""
        definition = define(self.config, self.run, self.mesh)
        trained, rest = (
            peft.load_adapter(self.adapter, self.run.lora, self.config, definition.params)
            if self.run.lora
            else ({}, definition.params)
        )
        with byte_bar("reading weights", self.source.bytes) as bar:
            return merge(self.source.load(self.run, self.mesh, bar.update, rest), trained)

    def check_memory(self, rows: int, tokens: int) -> None:
        """Raise InputError where weights, and keys and values of so many rows and tokens, pass a device's memory."""
        weights = sharding.bytes_on_device(define(self.config, self.run, self.mesh).params)
        with jax.set_mesh(self.mesh):
            shape = partial(make_cache, self.config, self.run.param_dtype, rows, tokens, self.run.scan_layers)
            cache = sharding.bytes_on_device(jax.eval_shape(shape))
        if weights + cache > (memory := memory_use()[1]):
            what = f"{rows} prompt(s) at a time" if rows > 1 else "a prompt"
            raise InputError(
                f"{what} of up to {tokens:,} tokens, answer included: {size(weights)} of weights and {size(cache)} of "
                f"keys and values do not fit the {size(memory)} of a device; lower --max_new_tokens"
                + (" or --batch_size" if rows > 1 else "")
            )

    def check_tokens(self, ids: list[int]) -> None:
        """Raise InputError for a token that the embedding has no row for."""
        if max(ids) >= self.config.vocab_size:
            past = f"the tokenizer has tokens past the embedding's {self.config.vocab_size} rows"
            raise InputError(f"{self.tokenizer.folder}: {past}; use the model's own tokenizer")


def open_model(args: argparse.Namespace, command: str) -> Opened:
    """Open the model of a command's flags, as `add_model_flags` adds them. Raises InputError."""
    refuse_several(command)
    platform = set_up_jax(args.use_cpu)
    source = Source(args.model_name_or_path, args.allow_pickle, tokenizer=args.tokenizer_name)
    for note in source.notes:
        say(note)
    tokenizer = open_tokenizer(source.tokenizer_folder)
    mesh = sharding.make_mesh(None if args.mesh else jax.devices()[:1], args.mesh or "auto")
    if sharding.batch_ways(mesh) * sharding.row_ways(mesh) > 1:
        raise InputError(f"--mesh {args.mesh}: a prompt can be divided over tensor only; give --mesh tensor=-1")
    lora, tensors, config = None, dict[str, Tensor](), source.config
    if args.adapter_name_or_path:
        adapter, tensors = peft.read_adapter(as_path(args.adapter_name_or_path), config)
        lora, config = adapter.lora, adapter.resized(config)
    layers, kind = config.num_hidden_layers, "bfloat16" if args.bf16 else "float32"
    kernel, _ = choose_kernel("auto", platform, mesh.devices.flat[0].device_kind, config.head_dim, kind)
    run = RunOptions(
        param_dtype=jnp.dtype(kind),
        attention=Kernel(kernel, 1, mesh.devices.flat[0].device_kind),
        scan_layers=layers > unrolled_layers(platform) and (lora is None or lora.uniform(layers)),
        lora=lora,
        quantization=Quantization(4 if args.load_in_4bit else 8) if args.load_in_4bit or args.load_in_8bit else None,
    )
    return Opened(source, tokenizer, config, mesh, run, tensors)
