"""Plan a run's device programs: the blocks and the recomputation that fit a device, by the compiler's count."""

import contextlib
import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from llama_jax.base.errors import InputError
from llama_jax.base.files import cache_folder, write_json
from llama_jax.data.batches import ROW_MULTIPLE, Batches
from llama_jax.data.packing import Shape
from llama_jax.distributed import processes, sharding
from llama_jax.distributed.platform import check_compiler_options, compiler_options, host_memory
from llama_jax.hf import peft
from llama_jax.hf.names import check_names, name_table, without_layer
from llama_jax.model.attention import Kernel, choose_kernel
from llama_jax.model.blockwise import SHORT
from llama_jax.model.definition import Definition, define
from llama_jax.model.llama import RunOptions
from llama_jax.model.matmul import Sum, check_fp8
from llama_jax.model.remat import REMAT
from llama_jax.model.roles import EmbeddingTable, Params
from llama_jax.plan.chips import Named, host_rate
from llama_jax.plan.memory import least_activation_bytes, score_bytes, step_bytes
from llama_jax.plan.operations import operations
from llama_jax.plan.schedule import dumping
from llama_jax.setup.adapters import choose_adapter, choose_quantization
from llama_jax.setup.job import Job
from llama_jax.training.guard import Guard, abstract_losses
from llama_jax.training.optimizer import decayed_roles, make_optimizer
from llama_jax.training.optimizer_names import OPTIMIZERS, WITHOUT_MOMENTS
from llama_jax.training.parts import passing_bytes
from llama_jax.training.state import TrainState, abstract_saved, abstract_state, saving_bytes
from llama_jax.training.step import Steps

ROW_LIMIT = 2048  # tokens of a row that holds several examples
MAX_TOKENS = 4096  # of a block on a device, where its memory is unknown
SIZES = (1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152, 65536)  # of blocks to choose from
UNROLLED = 48  # layers at most on a GPU: some 30 s a program, where a scan compiles in 3 s but runs 7 to 20% longer
OPERATIONS_A_BYTE = 170  # that a GPU usually makes while it reads or writes a byte
# The time of one more block an update, in tokens: the gradients so far, 8 bytes a parameter, are read and written.
BLOCK = 227
# Plain attention's passes over its float32 scores in a layer, forward and backward: written, read for the maximum, the
# sum and the weights, and their gradients likewise.
PASSES = 13


class Option(NamedTuple):
    """Hold the tokens of a block on a device, where examples are packed, and `RunOptions.remat`. Devices that share
    rows hold a multiple of these tokens together."""

    max_tokens: int
    remat: str


class Way(NamedTuple):
    """Describe a change of the run that needs less memory: `needed` bytes a device, and its effect as a `note`."""

    text: str
    needed: int
    note: str


@dataclass(frozen=True)
class Plan:
    """Hold a run with one choice of blocks: their shapes, the options, and the programs.

    `settle` compiles them and sets `needed`, the bytes that a device needs, and the seconds that it took in all.
    """

    option: Option
    batches: Batches
    run: RunOptions
    tx: optax.GradientTransformationExtraArgs
    definition: Definition
    abstract: TrainState
    steps: Steps
    needed: float = math.nan
    compiled_in: float = math.nan

    @property
    def largest_block(self) -> Shape:
        return max(self.batches.shapes, key=math.prod)

    @property
    def attention(self) -> str:
        """Return the names of the kernels that compute the rows of its blocks."""
        return " and ".join(sorted({self.run.attention.of(length) for _, length in self.batches.shapes}))

    def compile(self, shape: Shape, mesh: Mesh) -> int:
        """Compile a block's programs with `Steps.compile` and return the bytes that a device needs."""
        return self.steps.compile(self.abstract, shape, mesh)


class Planner:
    """Make the plans of a job whose parameters are of `dtype`. `state` and `saved` have the types of the train state
    and of a checkpoint's, and `run` the options that do not depend on the choice. `trainable` is the NNX filter of the
    parameters to train."""

    def __init__(self, job: Job, mesh: Mesh, platform: str, dtype: str, scan_layers: bool, trainable: Any = None):
        self.job, self.mesh, self._trainable, self._platform = job, mesh, trainable, platform
        args, self.device_kind = job.args, mesh.devices.flat[0].device_kind
        compute = jnp.bfloat16 if args.bf16 else None
        kind = "bfloat16" if args.bf16 else dtype
        head_dim, fixed = job.config.head_dim, args.full_determinism
        self.kernel, why = choose_kernel(args.attention, platform, self.device_kind, head_dim, kind, fixed)
        short = f", xla in rows of at most {SHORT} tokens" if self.kernel == "blockwise" else ""
        self.attention_line = f"attention kernel: {self.kernel}" + (f" ({why})" if platform != "cpu" else short)
        self.schedules: str | None = None  # folder where a TPU's compiler leaves the schedules of programs
        self._row_ways = sharding.row_ways(mesh)
        self._largest_update = math.ceil(_largest_update(job, sharding.batch_ways(mesh)) / self._row_ways)
        self._longest = math.ceil(int(job.examples.lengths.max()) / self._row_ways)
        self.run = RunOptions(
            param_dtype=jnp.dtype(dtype),
            compute_dtype=compute,
            rope_dtype=compute if args.hf_compat == "4.37" else None,
            fp8=args.fp8,
            scan_layers=scan_layers,
            sums=Sum(sharding.exchanges(mesh), args.gradient_sum_dtype == "bfloat16"),
            lora=job.adapter.lora if job.adapter else None,
            quantization=job.quantization,
            compiler_options=args.xla_options,
            longest=max(int(examples.lengths.max()) for examples in (job.examples, job.eval_examples) if examples),
        )
        self.definition = define(job.config, self.run, mesh, trainable)
        check_names(self.definition.base, job.config)
        losses = abstract_losses(mesh) if args.skip_loss_spikes else None
        self.state = abstract_state(self._optimizer(), self.definition, mesh, args.offload_optimizer)._replace(
            losses=losses
        )
        self.saved = abstract_saved(self.state, mesh)

    @property
    def answering(self) -> RunOptions:
        """Return the options of programs that answer prompts, which are rows of one segment.

        Their products are not of fp8: a token would round all weights anew.
        """
        return replace(self.run, attention=Kernel(self.kernel, 1, self.device_kind), fp8=False)

    def make(self, option: Option) -> Plan:
        """Pack the whole run and define its programs; nothing compiles."""
        args, job, max_tokens = self.job.args, self.job, option.max_tokens * self._row_ways
        # Plain attention costs the square of a row; splash visits the blocks of other segments too.
        row_limit = max_tokens if self.kernel == "cudnn" else ROW_LIMIT
        cost = self._cost if self.kernel == "xla" else None
        batches = job.batches(max_tokens, row_limit, sharding.batch_ways(self.mesh), cost)
        row = max(max_tokens, *(length for _, length in batches.shapes))
        kernel = Kernel(self.kernel, _most_segments(job, row), self.device_kind)
        options = (*self.run.compiler_options, *(dumping(self.schedules) if self.schedules else ()))
        run = replace(self.run, remat=option.remat, attention=kernel, compiler_options=options)
        blocks = batches.block_counts.astype(np.int32)
        several = bool(blocks.max() > 1)
        tx = self._optimizer(blocks if several and args.accumulation == "multisteps" else None)
        definition = define(job.config, run, self.mesh, self._trainable)
        sums = several and args.accumulation == "sum"
        steps = Steps(
            definition,
            tx,
            job.config.vocab_size,
            label_smoothing=args.label_smoothing_factor,
            sums=sums,
            seed=args.seed,
            guard=Guard(nonfinite=args.on_nonfinite == "skip", sigma=args.skip_loss_spikes),
            offload=args.offload_optimizer,
        )
        return Plan(
            option=option,
            batches=batches,
            run=run,
            tx=tx,
            definition=definition,
            abstract=abstract_state(tx, definition, self.mesh, args.offload_optimizer)._replace(
                losses=self.state.losses
            ),
            steps=steps,
        )

    def _cost(self, blocks: int, tokens: int, row: int) -> float:
        """Return the time of blocks with plain attention, in tokens without attention: a token's attention takes the
        row's length times its operations a key and its scores' way through memory, at a GPU's operations a byte."""
        config = self.job.config
        without = operations(config, 1, 1e-9, "none")[0]
        a_key = config.num_attention_heads * (12 * config.head_dim + PASSES * 4 * OPERATIONS_A_BYTE)
        return tokens * (1 + row * config.num_hidden_layers * a_key / without) + BLOCK * blocks

    @property
    def decayed(self) -> Params:
        """Return a tree of booleans over the trained parameters: true for those that a weight decay applies to."""
        return self.definition.having(*decayed_roles(self.job.args.hf_compat, self.job.config.model_type))

    def _optimizer(self, blocks: np.ndarray | None = None) -> optax.GradientTransformationExtraArgs:
        args = self.job.args
        adapter = self.job.adapter
        adapters = peft.name_table(adapter.lora, self.job.config).values() if adapter else ()
        tensors = dict([*name_table(self.job.config).values(), *adapters])
        return make_optimizer(
            args.optim,
            b1=args.adam_beta1,
            b2=args.adam_beta2,
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            decays=self.decayed,
            max_grad_norm=args.max_grad_norm,
            moments=args.adam_moments_dtype,
            # Embeddings keep 32 bits in 5; 4.37 looks for a class that it does not use.
            exact=self.definition.having(*((EmbeddingTable,) if args.hf_compat == "5" else ())),
            blocks=blocks,
            tensors=tensors | {without_layer(path): shape for path, shape in tensors.items()},
            seed=args.seed,
        )

    def options(self, limit: int | None) -> list[Option]:
        """Return the options to try, the fastest first; with `limit` bytes a device, only options that may fit."""
        args, given = self.job.args, self.job.args.max_tokens
        times = {name: time for name, remat in REMAT.items() if (time := remat.time_on(self._platform)) is not None}
        remats = list(times) if args.remat == "auto" else [args.remat]
        if limit is None:
            return [Option(given or MAX_TOKENS, "matmuls" if args.remat == "auto" else args.remat)]
        longest, update = self._longest, self._largest_update
        # An eighth more, as rows are not always full; the compiled shapes come from the updates.
        sizes = {given} if given else {update * 9 // 8, *(size for size in SIZES if longest <= size < update)}
        if not args.packing:
            rows = -(-args.per_device_train_batch_size * self.job.order.ranks // sharding.batch_ways(self.mesh))
            sizes = {rows * longest}
        options = [Option(size, remat) for size, remat in product(sizes, remats)]

        def slowness(option: Option) -> tuple[float, int]:
            blocks = math.ceil(update / option.max_tokens)
            time = times.get(option.remat, 1)  # of one choice alone it does not matter
            return update * time + BLOCK * blocks * (blocks > 1), -option.max_tokens

        fitting = [o for o in sorted(options, key=slowness) if self.least_bytes(o) < limit]
        return fitting or [min(options, key=self.estimate)]

    def held_bytes(self, option: Option) -> int:
        """Return the bytes that a device always holds: the state, a part of the moments in the host's memory, and
        gradient sums where an update has several blocks."""
        state, sums = map(sharding.bytes_on_device, (self.state, self.saved.params))
        return (
            state
            + passing_bytes(self.state.trainable, self.state.opt_state)
            + (option.max_tokens < self._largest_update) * sums
        )

    def least_bytes(self, option: Option) -> int:
        """Return a lower bound of a device's bytes: held bytes and the largest of kept activations, gradients and
        saving."""
        grads = sharding.bytes_on_device(self.state.trainable)
        kept = option.max_tokens * least_activation_bytes(self.job.config, self.run, option.remat, self.mesh)
        return self.held_bytes(option) + max(kept, grads, saving_bytes(self.state))

    def estimate(self, option: Option, longest: int | None = None) -> int:
        """Estimate the bytes of a device by arithmetic alone; `longest` tokens of an example in place of the data's.

        Beside the state: the largest moment of a step, with plain attention's scores, or the bytes that saving takes,
        if more.
        """
        tokens, given = option.max_tokens, (self.job.config, self.run, self.mesh)
        # The padding is a segment too.
        segments = _most_segments(self.job, tokens * self._row_ways) + 1 if self.kernel == "cudnn" else 0
        gradients = sharding.bytes_on_device(self.state.trainable)
        step = step_bytes(*given, option.remat, tokens=tokens, segments=segments, gradients=gradients)
        if self.kernel == "xla":
            row = max(longest or self._longest, min(tokens, ROW_LIMIT))
            step += score_bytes(*given, option.remat, tokens=tokens, row=row)
        return self.held_bytes(option) + max(step, saving_bytes(self.state))

    def choose(
        self,
        limit: int | None,
        report: Callable[[str], None] = lambda line: None,
        remember: bool = True,
        smaller: bool = False,
    ) -> tuple[Plan, float]:
        """Return the first option that fits `limit` bytes a device (None: the first), or the last, and the bytes that
        it needs. Its largest block's program is compiled, and with `smaller` the others at the same time, as the first
        option mostly fits; bytes are infinite where the compiler refuses the largest. With `remember`, a fit is stored
        for the next such run: pass False where the compiler's effort is not the run's."""
        self._check_device()
        options = self.options(limit)
        found_before = self._found_before(limit)
        with contextlib.suppress(OSError, ValueError, TypeError):  # also where the stored option is no longer offered
            options = options[options.index(Option(**json.loads(found_before.read_text()))) :]
        for option in options:
            plan = self.make(option)
            rows, length = plan.largest_block
            others = [shape for shape in plan.batches.shapes if shape != plan.largest_block] if smaller else []
            more = f", and {len(others)} smaller block(s)" if others else ""
            report(f"compiling an update in blocks of {rows:,} x {length:,} tokens, --remat {option.remat}{more}")
            with ThreadPoolExecutor(max_workers=min(len(others) + 1, os.cpu_count() or 1)) as pool:
                largest, *rest = [
                    pool.submit(plan.compile, shape, self.mesh) for shape in (plan.largest_block, *others)
                ]
                try:
                    needed: float = largest.result()
                except JaxRuntimeError as e:
                    if "RESOURCE_EXHAUSTED" not in str(e):
                        raise
                    needed = math.inf
                if needed <= (limit or math.inf):
                    for future in rest:
                        future.result()
                for future in rest:
                    future.cancel()
            if limit is None or needed <= limit:
                break
        if remember and limit is not None and needed <= limit:
            with contextlib.suppress(OSError):  # the file only saves time
                found_before.parent.mkdir(parents=True, exist_ok=True)
                write_json(found_before, option._asdict())
        return plan, needed

    def settle(self, limit: int | None, report: Callable[[str], None] = lambda line: None) -> Plan:
        """Return the plan that `choose` finds, with all programs compiled. Raises InputError where none fits."""
        started = time.monotonic()
        plan, needed = self.choose(limit, report, smaller=True)
        self._check_room(plan.option, needed, limit)
        return replace(plan, needed=needed, compiled_in=time.monotonic() - started)

    def check_room(self, limit: int | None) -> None:
        """Raise InputError where arithmetic alone shows that nothing fits: before weights are read."""
        self._check_device()
        hosted, memory = sharding.bytes_on_host(self.state) * len(self.mesh.local_devices), host_memory()
        if hosted and (hosted := hosted * processes.on_this_host()) > memory:
            raise InputError(
                f"--offload_optimizer True: the moments take {hosted / 2**30:.3g} GiB of this host's memory, which has "
                f"{memory / 2**30:.3g} GiB; use --optim adamw_8bit, or more hosts"
            )
        option = self.options(limit)[0]
        on_cpu = limit is None and self._platform == "cpu"
        if on_cpu:  # it gives no limit; the system would kill the process
            limit = host_memory() // len(self.mesh.local_devices)
        self._check_room(option, self.least_bytes(option), limit)
        if on_cpu and self.kernel == "xla":
            scores = 4 * self.job.config.num_attention_heads * self._longest**2
            if (needed := self.held_bytes(option) + scores) > (memory := host_memory()):
                raise InputError(
                    f"the run needs over {needed / 2**30:.3g} GiB, and this host has {memory / 2**30:.3g} GiB: its "
                    f"longest example has {self._longest:,} tokens, of which --attention xla holds every pair; "
                    "use --attention auto, or leave such records out"
                )

    def _check_device(self) -> None:
        """Raise InputError where the device lacks a type of the run, or its compiler an option. `--explain` and exports
        need none."""
        check_compiler_options(self.mesh, self.run.compiler_options)
        if self.job.args.fp8:
            check_fp8(self.mesh.devices.flat[0])

    def _check_room(self, option: Option, needed: float, limit: int | None) -> None:
        if limit is not None and needed > limit:
            verdict = f"needs {needed / 2**30:.3g} GiB" if needed < math.inf else "does not fit"
            ways = ", or ".join(f"{way.text} ({way.needed / 2**30:.3g} GiB{way.note})" for way in self.ways_out(limit))
            raise InputError(
                f"the run {verdict}, and a device has {limit / 2**30:.3g} GiB for it, even in blocks of "
                f"{option.max_tokens} tokens with --remat {option.remat}; needed by arithmetic with one change: {ways}"
            )

    def ways_out(self, limit: int) -> list[Way]:
        """Return the changes of devices or flags that need less memory, each alone, in the order of their effect on the
        updates: none, the type of the moments or the parameters, the optimizer, the data, the parameters to train and
        the weights below."""
        args, now = self.job.args, min(map(self.estimate, self.options(limit)))
        lr, ways = args.learning_rate, list[Way | None]()
        free = {"remat": "auto", "max_tokens_per_device": "auto", "packing": True}
        if changed := {name: value for name, value in free.items() if getattr(args, name) != value}:
            ways.append(self._way(" ".join(f"--{n} {v}" for n, v in changed.items()), limit, changed))
        more = None
        for times in (2, 4, 8, 16, 32, 64):  # the fewest that fit, else the most
            more = self._way(f"{times * self.mesh.size} devices", limit, {"mesh": "auto"}, times) or more
            if more and more.needed <= limit:
                break
        ways.append(more)
        rounding = f"; steps of --learning_rate {lr:g} do not move parameters above {512 * lr:.2g}"
        if not args.offload_optimizer and args.optim not in WITHOUT_MOMENTS:
            offload = {"offload_optimizer": True, "accumulation": "sum"}
            moved = transfer(self.state.opt_state, self.device_kind)
            slower = f", and the moments in the host's memory; slower: {moved}"
            ways.append(self._way("--offload_optimizer True", limit, offload, note=slower))
        if args.optim == "adamw_torch":
            for name, value in (("adam_moments_dtype", "bfloat16"), ("optim", "adamw_8bit")):
                rounded_moments = {"adam_moments_dtype": None, name: value}
                ways.append(self._way(f"--{name} {value}", limit, rounded_moments, note=", rounds the moments"))
        if self.run.param_dtype == jnp.float32:
            ways.append(self._way("--dtype bfloat16", limit, {"dtype": "bfloat16"}, note=rounding))
        for optim in OPTIMIZERS:
            if not optim.startswith("adamw"):
                other: dict[str, Any] = {"optim": optim, "adam_moments_dtype": None}
                if optim in WITHOUT_MOMENTS:
                    other["offload_optimizer"] = False
                ways.append(self._way(f"--optim {optim}", limit, other, note=", other updates"))
        half = -(-self._longest // 2)
        block = next((size for size in SIZES if half <= size < self._longest), None)
        if block is not None:  # of half as long examples; no shorter block than SIZES is planned
            shorter = min(self.estimate(Option(block, option.remat), half) for option in self.options(limit))
            ways.append(Way(f"--model_max_length {half * self._row_ways}", shorter, ", for records of text"))
        adapters, rounded = {"use_peft": True}, {"load_in_4bit": True}
        below = "over weights rounded to 4 bits"
        if self.job.adapter is None and self._trainable is None:
            ways.append(self._way("--use_peft True", limit, adapters, note=", trains an adapter"))
            text, both = "--use_peft True --load_in_4bit True", adapters | rounded
            ways.append(self._way(text, limit, both, note=f", trains an adapter {below}"))
        elif self.job.adapter is not None and self.job.quantization is None:
            ways.append(self._way("--load_in_4bit True", limit, rounded, note=f", {below}"))
        return [way for way in ways if way is not None and way.needed < now]

    def _way(self, text: str, limit: int, changes: dict[str, Any], times: int = 1, note: str = "") -> Way | None:
        """Estimate the least bytes of a device with other flags, on `times` as many devices with the same updates; None
        where such a run is refused."""
        args = copy.copy(self.job.args)
        for name, value in changes.items():
            setattr(args, name, value)
        mesh, dtype = self.mesh, np.dtype(self.run.param_dtype).name
        try:
            if times > 1:
                devices: list[Any] = [Named(i, "gpu", self.device_kind) for i in range(times * self.mesh.size)]
                mesh = sharding.make_mesh(devices, args.mesh)
                note = f", the same updates with --world_size {self.job.order.ranks}"
            adapter = self.job.adapter or choose_adapter(args, self.job.config)[0]
            quantization = choose_quantization(args)
            job = replace(self.job, args=args, adapter=adapter, quantization=quantization)
            other = Planner(
                job,
                mesh,
                self._platform,
                dtype=changes.get("dtype", dtype),
                scan_layers=choose_scan(job, self._platform),
                trainable=self._trainable,
            )
        except InputError:
            return None
        return Way(text, min(map(other.estimate, other.options(limit))), note)

    def _found_before(self, limit: int | None) -> Path:
        """Return the file of the option found earlier for such a job on such devices."""
        args, job, run = self.job.args, self.job, self.run
        flags: list[Any] = [args.optim, args.adam_moments_dtype, args.hf_compat, args.accumulation]
        flags += [args.remat, args.max_tokens_per_device, args.packing, args.offload_optimizer]
        key = [job.config, run, self.kernel, self.device_kind, limit, self.mesh.shape, jax.__version__, *flags]
        key += [self._largest_update, int(job.examples.lengths.max()), compiler_options(self.mesh, run.fp8), REMAT]
        return cache_folder("plans") / f"{hashlib.blake2b(repr(key).encode(), digest_size=20).hexdigest()}.json"


def transfer(opt_state: Any, kind: str) -> str:
    """Return the bytes that a device of jax's name `kind` exchanges with its host for an update, and their time at an
    assumed rate, where an optimizer's moments are in the host's memory. The state may lie on either."""
    size, rate = sharding.bytes_on_device(opt_state) + sharding.bytes_on_host(opt_state), host_rate(kind)
    return f"{size / 1e9:.3g} GB each way an update, {size / rate:.2g} s at {rate / 1e9:.0f} GB/s (assumed)"


def _largest_update(job: Job, ways: int) -> int:
    """Return the tokens that each of `ways` devices gets of the largest update."""
    lengths, order = job.examples.lengths, job.order
    most = order.reduce(np.add, lengths, order.bounds).max()
    return max(math.ceil(most / ways), int(lengths.max()))


def _most_segments(job: Job, tokens: int) -> int:
    """Return a bound of the segments in a row of `tokens`, or of the longest example: all of an update's examples, or
    as many of the shortest as fit."""
    order, size = job.order, job.args.per_device_eval_batch_size
    an_update = int(np.diff(order.bounds).max()) * order.per_device_batch * order.ranks
    an_epoch = order.batches_per_epoch * order.per_device_batch * order.ranks
    most = 0
    for examples, dealt, limit in (
        (job.examples, an_epoch, an_update),
        (job.eval_examples, 0 if job.eval_examples is None else _up(len(job.eval_examples), size * order.ranks), None),
    ):
        if examples is not None:
            row = _up(max(tokens, examples.lengths.max()), ROW_MULTIPLE)
            # Several ranks are filled up with repeated examples, and an update may begin a new epoch.
            repeats = -(-dealt // len(examples)) * (1 if limit is None else -(-limit // dealt) + 1)
            shortest = np.repeat(np.sort(examples.lengths)[:row], repeats)
            fitting = int(np.searchsorted(np.cumsum(shortest), row, side="right"))
            most = max(most, min(fitting, limit or fitting))
    return most


def _up(number: int, multiple: int) -> int:
    return -(-int(number) // multiple) * multiple


def unrolled_layers(platform: str) -> int:
    """Return the most layers that are compiled one by one. They run faster and compile slower than stacked ones: they
    are for few layers, or for as many as a GPU's user waits for."""
    return UNROLLED if platform == "gpu" else 8


def choose_scan(job: Job, platform: str) -> bool:
    """Return whether to stack layers. Raises InputError."""
    args = job.args
    if job.adapter and not job.adapter.lora.uniform(job.config.num_hidden_layers):
        if args.scan_layers:
            raise InputError("--scan_layers True: stacked layers need the same adapters in each; leave the flag out")
        return False
    if args.offload_optimizer:  # moments pass through the device a layer at a time
        if args.scan_layers:
            raise InputError("--scan_layers True: --offload_optimizer needs each layer by itself; leave one out")
        return False
    if args.optim == "adafactor":  # adafactor factors each matrix, not a stack
        if args.scan_layers:
            raise InputError("--scan_layers True: adafactor needs each layer by itself; leave the flag out")
        return False
    return job.config.num_hidden_layers > unrolled_layers(platform) if args.scan_layers is None else args.scan_layers
