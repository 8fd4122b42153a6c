"""What the compiler for an H200 makes of the programs whose speed depends on it, on a machine without a GPU."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from gpu_compiler import FOLDER, LAYERS, SHAPE, SLOTS, TOKENS, WIDE, environment

from llama_jax.model.lora import PROJECTIONS
from llama_jax.plan.hlo import Instruction, Program

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    if not FOLDER.is_dir():
        pytest.skip("needs jax's CUDA plugin, which `make slow` installs")
    command = [sys.executable, "-c", "import gpu_compiler; gpu_compiler.main()"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: Program(text) for name, text in json.loads(done.stdout.splitlines()[-1]).items()}


def test_memory_by_arithmetic(tmp_path: Path) -> None:
    """Of 5 layers of 7B, the estimate is at least the memory of the compiled update, and at most 128 MiB a layer above.
    The arithmetic adds up peaks that do not quite coincide, by a part of one layer, which keeps 2 GiB: 600 MiB at most,
    of 3 layers or 8. `least_bytes` is below."""
    if not FOLDER.is_dir():
        pytest.skip("needs jax's CUDA plugin, which `make slow` installs")
    adapters = "--use_peft True --lora_target_modules all-linear --lora_r 16"
    cases = ["--remat none", "--remat none --fp8 True", f"{adapters} --remat none", f"{adapters} --remat full"]
    cases += [f"{adapters} --remat none --lora_dropout 0{fp8}" for fp8 in ("", " --fp8 True")]
    call = f"gpu_compiler.memory(gpu_compiler.Path({str(tmp_path)!r}), {[case.split() for case in cases]})"
    command = [sys.executable, "-c", f"import gpu_compiler; {call}"]
    done = subprocess.run(command, env=environment(merged=True), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    room = 2**27 * WIDE["num_hidden_layers"]
    for case, (estimate, least, needed) in zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert least <= needed <= estimate <= needed + room, (case, least, needed, estimate)


def outside_fusions(program: Program) -> list[Instruction]:
    fused = {i.attribute("calls") for lines in program.computations.values() for i in lines}
    return [i for name, lines in program.computations.items() if name not in fused for i in lines]


def kernels(program: Program) -> list[Instruction]:
    """The instructions that write an array to memory."""
    kinds = ("fusion", "custom-call", "copy", "transpose", "convert")
    return [i for i in outside_fusions(program) if i.kind in kinds]


def written(program: Program) -> Counter[str]:
    """The arrays that kernels write, by type and shape, axes of 1 left out."""
    arrays = (a for i in kernels(program) for a in re.findall(r"\b[a-z]+\d\w*\[[\d,]*\]", i.result))
    return Counter(re.sub(r"\b1,|,1\b", "", array) for array in arrays)


def test_fp8(programs: dict[str, Program]) -> None:
    """All products but the attention's and the head's are of fp8; each tensor is written once for each of its uses."""
    program = programs["fp8"]
    targets = Counter(t for i in kernels(program) for t in re.findall(r'custom_call_target="([^"]*)"', i.rest))
    assert targets["__cublas$lt$matmul$f8"] == 3 * len(PROJECTIONS) * LAYERS, targets
    assert targets["__cublas$lt$matmul"] == 6 * LAYERS + 3, targets
    in_fp8 = sum(n for array, n in written(program).items() if array.startswith("f8"))
    inputs, weights, gradients = 4, len(PROJECTIONS), len(PROJECTIONS)  # of a layer; q, k, v and gate, up share one
    assert in_fp8 <= 2 * (inputs + weights + gradients) * LAYERS, written(program)


@pytest.mark.parametrize("rows", [1, 8])
def test_decoding(rows: int, programs: dict[str, Program]) -> None:
    """A token writes its keys and values into the cache in place; the host looks every fourth token."""
    program = programs[f"decoding {rows}"]
    heads, H = SHAPE["num_key_value_heads"], SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    cache = re.sub(r"\b1,", "", f"bf16[{rows},{heads},{SLOTS},{H}]")
    loops = [i for i in outside_fusions(program) if i.kind == "while"]
    assert sorted('"known_trip_count":{"n":"4"}' in i.rest for i in loops) == [False, True]
    assert not [i for i in kernels(program) if i.kind == "copy" and "bf16" in i.result]
    assert written(program)[cache] == 2 * LAYERS, written(program)


def test_decoding_by_cudnn(programs: dict[str, Program]) -> None:
    """A call a layer reads the cache as it lies; of stacked layers XLA's own products do."""
    heads, H = SHAPE["num_key_value_heads"], SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    for name, calls, layers in (("decoding 8 by cudnn", LAYERS, ""), ("decoding 8, stacked", 0, f"{LAYERS},")):
        program = programs[name]
        assert len([i for i in kernels(program) if "__cudnn$fmha" in i.rest]) == calls
        cache, layer = f"bf16[{layers}8,{heads},{SLOTS},{H}]", f"bf16[8,{heads},{SLOTS},{H}]"
        assert written(program)[cache] == (2 if layers else 2 * LAYERS), written(program)
        assert cache == layer or not written(program)[layer]


@pytest.mark.parametrize("rows", [1, 8])
def test_decoding_in_int8(rows: int, programs: dict[str, Program]) -> None:
    """Products read the codes: no kernel writes a projection. Those of a single token read codes in pairs."""
    program = programs[f"decoding {rows} in int8"]
    D, F = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    shapes = {f"{outputs},{inputs}" for outputs, inputs in ((D, D), (F, D), (D, F))}
    assert not {f"bf16[{shape}]" for shape in shapes} & written(program).keys()  # float32 terms of small ones are
    pairs = [i for lines in program.computations.values() for i in lines if re.match(r"s16\[\d+,\d+\]", i.result)]
    assert len([i for i in pairs if i.kind == "bitcast"]) == (len(PROJECTIONS) * LAYERS if rows == 1 else 0)


def test_moments_in_8_bits(programs: dict[str, Program]) -> None:
    """No kernel writes a moment in float32: nothing of a projection's shape but codes, halves and gradients."""
    D, F = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    matrices = ((D, D), (F, D), (D, F))
    shapes = {f"{rows},{rest}" for rows, size in matrices for rest in (f"{size}", f"{size // 256},256")}
    found = {array for array in written(programs["8 bits"]) if array.partition("[")[2][:-1] in shapes}
    kinds = {array.partition("[")[0] for array in found}
    assert "u8" in kinds and kinds <= {"bf16", "u16", "s16", "u8"}, found
    assert TOKENS < D  # else activations have these shapes
