#!/usr/bin/env python3
"""Check a machine's results, time the programs that no estimate decides between, and write one file to send back.

    python benchmarks/first_hour.py [--output first_hour.json]

1. The machine: devices, memory, versions.
2. Results against float32 on the host: attention in each shape class, projections and their gradients summed over all
   devices, a tiny model's loss and gradients; on several devices, 20 updates against one device.
3. 20 updates against the real Trainer's on a CPU (`golden_run.py`), in float32.
4. Milliseconds of an update by each of PROGRAMS, of one shape and the same work: `speed.py`.

Each step is a process of its own, as one process alone can hold a TPU. The file is written after each step; a second
start skips the steps that ended on the same machine and versions. A step that fails is recorded, and the next begins.
Exits with 1 if a result of 2 or 3 is wrong or missing.

Without --shape it is llama-7b on a TPU or GPU, and `tiny` on a CPU. A shape has all its layers where float32 weights
and Adam's moments, 12 bytes a parameter, take at most half of the devices' memory, else as many as do.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from make_model import SHAPES, raw_config
from rows import Row

from llama_jax.base.errors import InputError, run_command
from llama_jax.base.files import write_json
from llama_jax.base.versions import versions
from llama_jax.distributed import processes
from llama_jax.distributed.compat import find_cluster
from llama_jax.model.config import LlamaConfig
from llama_jax.plan.chips import peak_flops
from llama_jax.reporting.progress import say, show, waiting


class Program(NamedTuple):
    """Name a program by its flags of train_jax.py; `layers` are the most that it compiles in minutes, None for all.
    `tpu` marks options that a TPU's compiler alone has."""

    name: str
    flags: str = ""
    layers: int | None = None
    tpu: bool = False


FEW = 4  # layers one by one: a compiler's time grows with them
RINGS, FAST_MEMORY = "xla_jf_spmd_threshold_for_windowed_einsum_mib", "xla_tpu_scoped_vmem_limit_kib"
SPARSE = "xla_tpu_enable_sparse_core_collective_offload"  # libtpu takes the options on chips without sparse cores, too
BESIDE = "xla_enable_async_all_reduce=true,xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true"
# The compiler's estimates leave these open (BENCHMARKS.md): the schedule without rings depends on the time of sums that
# overlap with nothing, or on the rate of sparse cores; sums beside the work are shorter in order and longer by the
# schedule; cycles and schedule disagree on an operation's fast memory and on recomputation.
REMAT = "--remat matmuls"
PROGRAMS = [
    Program("defaults"),
    Program("remat matmuls", REMAT),
    Program("remat qkv", "--remat qkv"),
    Program("remat attention", "--remat attention"),
    Program("products in rings", f"{REMAT} --compiler_options {RINGS}=-1,{FAST_MEMORY}=-1", tpu=True),
    Program("no rings", f"{REMAT} --compiler_options {RINGS}=1000000,{FAST_MEMORY}=-1", tpu=True),
    Program("no rings, 96 MiB", f"{REMAT} --compiler_options {RINGS}=1000000,{FAST_MEMORY}=98304", tpu=True),
    Program(
        "no sparse cores",
        f"{REMAT} --compiler_options {SPARSE}_all_gather=false,{SPARSE}_reduce_scatter=false",
        tpu=True,
    ),
    Program("sums beside the work", f"{REMAT} --compiler_options {BESIDE}", tpu=True),
    Program("sums in bfloat16", f"{REMAT} --gradient_sum_dtype bfloat16"),
    Program("few layers, stacked", "--scan_layers True", FEW),
    Program("few layers, one by one", "--scan_layers False", FEW),
]
PACKAGES = ("llama_jax", "jax", "jaxlib", "libtpu", "flax", "optax", "numpy")
VARIABLES = ("JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS")
TOKENS, TIMED = 2048, 20  # tokens a device in an update; seconds of updates of a program
LONGEST = 900  # seconds of a step: one that hangs must not take the hour
# Seen on CPUs: 3.3e-7 in loss, 4.9e-6 in norm. With each product of a projection off by up to 2^-20, as six passes of
# bf16 and a TPU's own rounding may leave them, the same; by 2^-16 (three passes), 6e-7 and 1e-5; by 2e-3 (one pass),
# 4.9e-5 and 7.7e-4, which the bounds exclude.
LOSS, NORM = 1e-5, 1e-4


def machine() -> dict[str, Any]:
    """Return what the results depend on, as JSON values."""
    import jax

    from llama_jax.distributed.platform import host_memory

    devices = jax.devices()
    coords = [list(getattr(d, "coords", ())) for d in devices]
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "devices": len(devices),
        "coords": coords,
        "topology": [max(side) + 1 for side in zip(*coords, strict=True)],
        "processes": jax.process_count(),
        "memory": (devices[0].memory_stats() or {}).get("bytes_limit"),
        "host_cores": os.cpu_count(),
        "host_memory": host_memory(),
        "versions": {"python": platform.python_version(), "commit": commit, **versions(*PACKAGES)},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def attention(dtype: str) -> Iterator[Row]:
    import attention_kernels

    mesh, host = _meshes()
    yield from attention_kernels.check("auto", _mesh(mesh.devices.flat[:1]), dtype, host)


def products(dtype: str) -> Iterator[Row]:
    from correctness import check_products

    yield from check_products(_meshes()[0], dtype)


def gradients() -> Iterator[Row]:
    from correctness import check_gradients

    mesh, host = _meshes()
    yield from check_gradients(_tiny(), mesh, _kernel("bfloat16"), host)


def meshes(kind: str) -> Iterator[Row]:
    from correctness import check_meshes

    yield from check_meshes(_tiny(), _meshes()[0].devices.flat[0].platform, kind)


def golden() -> Iterator[Row]:
    """Make the updates of tests/golden/full.json by train_jax.py on all devices."""
    from golden_run import GOLDEN, TRAINER, write_inputs

    from llama_jax.command import train

    expected = json.loads(GOLDEN.read_text())
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        model, data = write_inputs(folder)
        paths = {"model_name_or_path": model, "data_path": data, "output_dir": folder / "out"}
        flags = [
            word for name, path in {**paths, "cache_dir": folder / "cache"}.items() for word in (f"--{name}", path)
        ]
        flags += [*TRAINER.split(), "--hf_compat", "5", "--world_size", "1", "--bf16", "False"]
        train.main([*map(str, flags), "--disable_tqdm", "True"])
        log = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    log = [entry for entry in log if "loss" in entry]
    for entry, loss, norm in zip(log, expected["losses"], expected["grad_norms"], strict=True):
        errors = {"loss": (abs(entry["loss"] / loss - 1), LOSS), "norm": (abs(entry["grad_norm"] / norm - 1), NORM)}
        yield Row(f"update {entry['step']}", errors)


def _meshes() -> tuple[Any, Any]:
    """Set JAX up, and return the meshes of all devices and of the host's CPU. Raises InputError."""
    import jax

    from llama_jax.distributed.platform import set_up_jax

    set_up_jax()
    try:
        host = jax.local_devices(backend="cpu")[:1]
    except RuntimeError:
        given = os.environ.get("JAX_PLATFORMS")
        raise InputError(f"JAX_PLATFORMS={given}: should name cpu too, which makes the reference") from None
    return _mesh(), _mesh(host)


def _mesh(devices: Any = None) -> Any:
    from llama_jax.distributed import sharding

    return sharding.make_mesh(devices)


def _tiny() -> LlamaConfig:
    from golden_run import CONFIG

    return LlamaConfig.from_hf(CONFIG)


def _kernel(dtype: str) -> str:
    from llama_jax.model.attention import choose_kernel

    device = _meshes()[0].devices.flat[0]
    return choose_kernel("auto", device.platform, device.device_kind, _tiny().head_dim, dtype)[0]


CHECKS: dict[str, Callable[[], Iterator[Row]]] = {
    "attention in float32": lambda: attention("float32"),
    "attention in bfloat16": lambda: attention("bfloat16"),
    "projections in float32": lambda: products("float32"),
    "projections in bfloat16": lambda: products("bfloat16"),
    "a model's gradients": gradients,
    "the Trainer's curve": golden,
    "meshes in float32": lambda: meshes("float32"),
    "meshes in bf16": lambda: meshes("bf16"),
}


def only(step: str) -> None:
    """Make a step in this process, and print what it finds, a line of JSON each."""
    if step == "machine":
        print("RESULT " + json.dumps(machine()), flush=True)
        return
    for row in CHECKS[step]():
        print("ROW " + json.dumps(row.as_json()), flush=True)


def run_step(command: list[str], seconds: float) -> dict[str, Any]:
    """Run a Python command, and return what it found. It is stopped after so many seconds."""
    try:
        made = subprocess.run([sys.executable, *command], capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as e:
        said = (e.stderr or b"").decode(errors="replace")
        return read_output(
            (e.stdout or b"").decode(errors="replace"), f"{said}\nError: stopped after {seconds:.0f} s", 1
        )
    return read_output(made.stdout.decode(errors="replace"), made.stderr.decode(errors="replace"), made.returncode)


def read_output(out: str, err: str, code: int) -> dict[str, Any]:
    """Return the rows and the result that a step printed, and the error that ended it."""
    lines, found = out.splitlines(), dict[str, Any]()
    # A step that is stopped may leave half a line.
    whole = [line for line in lines if line.startswith("ROW ") and line.endswith("}")]
    found["rows"] = [json.loads(line.removeprefix("ROW ")) for line in whole]
    for line in lines:
        if line.startswith("RESULT "):
            found["result"] = json.loads(line.removeprefix("RESULT "))
    if code:
        said = re.findall(r"^.*(?:[Ee]rror|Exception)\b.*$", err, re.MULTILINE) or err.split("\n")
        found |= {"error": said[-1].strip() or f"exit code {code}", "stderr": err[-4000:]}
    elif not lines or not (found["rows"] or "result" in found):
        found["error"] = "ended without a result"
    return found


def fitting_layers(shape: str, memory: int | None, devices: int) -> int:
    """Return the layers of a shape whose state takes at most half of the devices' memory, at least one."""
    layers = SHAPES[shape][3]
    if memory is None:
        return layers
    sizes = (12 * LlamaConfig.from_hf(raw_config(shape, n)).num_parameters for n in range(layers, 1, -1))
    return next((n for n, size in zip(range(layers, 1, -1), sizes, strict=True) if 2 * size <= memory * devices), 1)


def describe(step: dict[str, Any], peak: float | None) -> str:
    """Return a step's outcome for the table; `peak` is a device's operations a second, None if unknown."""
    if "error" in step:
        return f"FAILED: {step['error'][:160]}"
    if r := step.get("result"):
        mfu = f"{1e12 * r['tflops'] / peak:.1%} MFU, " if peak else ""
        return (
            f"{r['ms_median']:,.1f} ms an update, {r['tokens_s']:,.0f} tokens/s a device, {mfu}"
            f"{r['memory_gib']:.1f} GiB, compiled in {r['compile_s']:.0f} s; {r['detail']}"
        )
    wrong = [row["name"] for row in step["rows"] if not row["fine"]]
    share = max(e["error"] / e["bound"] for row in step["rows"] for e in row["errors"].values())
    return f"WRONG: {'; '.join(wrong)}" if wrong else f"right: {len(step['rows'])} rows, at most {share:.0%} of a bound"


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the flags. Raises InputError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("first_hour.json"), help="the file to send back")
    parser.add_argument("--seconds", type=float, default=3600, help="after which no step begins or goes on")
    parser.add_argument("--shape", choices=SHAPES, help="timed; see above")
    parser.add_argument("--only", choices=["machine", *CHECKS], help=argparse.SUPPRESS)  # a step, in this process
    args = parser.parse_args(argv)
    if args.seconds <= 0:
        raise InputError(f"--seconds {args.seconds}: should be above 0")
    if args.output.is_dir():
        raise InputError(f"--output {args.output}: is a folder; give a file's name")
    if not args.output.absolute().parent.is_dir():
        raise InputError(f"--output {args.output}: its folder does not exist; make it, or give another")
    return args


def check_alone() -> None:
    """Raise InputError where several processes would have to work together."""
    processes.refuse_several("benchmarks/first_hour.py")
    cluster = find_cluster()
    if cluster and (hosts := cluster.get_process_count()) > 1:
        raise InputError(
            f"benchmarks/first_hour.py runs on one host, and this slice has {hosts}; create a slice of one host, as "
            "v5e-8, v6e-8 or v5p-8"
        )


def earlier_steps(output: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the steps that an earlier start on this machine wrote. Raises InputError for another file or machine."""
    if not output.exists():
        return {}
    try:
        before = json.loads(output.read_text())
        # A GPU's memory changes with what else runs there.
        changed = [key for key in facts if key != "memory" and before["machine"].get(key) != facts[key]]
        steps = {name: {**step, "command": [*step["command"]]} for name, step in before["steps"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{output}: is not a file of this script; move it away, or give --output") from None
    if changed:
        raise InputError(f"{output}: is of other {', '.join(changed)}; move it away, or give --output")
    return steps


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.only:
        only(args.only)
        return 0
    check_alone()
    deadline, here = time.monotonic() + args.seconds, str(Path(__file__).resolve())
    with waiting("the machine"):
        found = run_step([here, "--only", "machine"], args.seconds)
    if "error" in found:
        raise InputError(f"JAX finds no devices: {found['error']}")
    facts = found["result"]
    shape = args.shape or ("tiny" if facts["platform"] == "cpu" else "llama-7b")
    facts["shape"] = shape
    report = {"machine": facts, "steps": earlier_steps(args.output, facts)}
    layers = fitting_layers(shape, facts["memory"], facts["devices"])
    commands = {name: [here, "--only", name] for name in CHECKS if facts["devices"] > 1 or "meshes" not in name}
    for program in [p for p in PROGRAMS if facts["platform"] == "tpu" or not p.tpu]:
        flags = f"--shape {shape} --layers {min(layers, program.layers or layers)} --seconds {TIMED} --only ours"
        flags += f" --work 1x{min(TOKENS, SHAPES[shape][7])}"
        name = str(Path(here).parent / "speed.py")
        commands[program.name] = [name, *flags.split(), f"--flags={program.flags}"]

    memory = f"{facts['memory'] / 2**30:.2f} GiB each" if facts["memory"] else "no limit of memory"
    show(f"{facts['devices']} x {facts['kind']}, {memory}; {shape}, {layers} layers\n\n| step | | s |\n|---|---|--:|")
    peak = peak_flops(facts["kind"], 1)
    # What failed before comes last: it may fail again.
    failed = {name for name in commands if "error" in report["steps"].get(name, {})}
    for number, (name, command) in enumerate(sorted(commands.items(), key=lambda item: item[0] in failed), 1):
        step = report["steps"].get(name)
        started = time.monotonic()
        over = started > deadline and step  # what an earlier start wrote stays
        if not over and (not step or "error" in step or step["command"] != command):
            with waiting(f"{number} of {len(commands)}: {name}"):
                left = deadline - started
                made = run_step(command, min(left, LONGEST)) if left > 0 else {"error": "not begun: --seconds are over"}
            step = {"command": command, "seconds": round(time.monotonic() - started, 1), **made}
            report["steps"][name] = step
            write_json(args.output, report)  # at once: the connection may be cut
        show(f"| {name} | {describe(step, peak)} | {step['seconds']:.0f} |")
    say(f"{args.output}: the file to send back")
    checks = [report["steps"][name] for name in commands if name in CHECKS]
    return int(any("error" in step or not all(row["fine"] for row in step["rows"]) for step in checks))


if __name__ == "__main__":
    sys.exit(run_command(main))
