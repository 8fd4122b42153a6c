"""benchmarks/first_hour.py on simulated devices: its file, what it skips, and errors that it must find."""

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forks import on_devices
from tiny import ROOT, environment, of_devices, slow_unless

sys.path.insert(0, str(ROOT / "benchmarks"))
import attention_kernels
import first_hour

import llama_jax.model.attention
from llama_jax.base.errors import InputError
from llama_jax.model import matmul
from llama_jax.setup.arguments import parse_arguments

SHORT = ("attention in float32", "attention in bfloat16", "projections in float32", "projections in bfloat16")
TIMED = {"ms_median": 20.0, "tokens_s": 512.0, "tflops": 98.5, "memory_gib": 1.0, "compile_s": 2.0, "detail": "fsdp=2"}


def in_process(command: list[str], seconds: float) -> dict[str, Any]:
    """Do as `first_hour.run_step`, without a start of Python; the result of a timing is made up."""
    out = io.StringIO()
    if Path(command[0]).name == "speed.py":
        return first_hour.read_output(f"RESULT {json.dumps(TIMED)}", "", 0)
    with contextlib.redirect_stdout(out):
        try:
            first_hour.main(command[1:])
        except Exception:
            return first_hour.read_output(out.getvalue(), traceback.format_exc(), 1)
    return first_hour.read_output(out.getvalue(), "", 0)


def script(folder: str, checks: tuple[str, ...] = SHORT) -> tuple[int, dict[str, Any]]:
    """Run some checks of the script in this fork; return its exit code and its file."""
    first_hour.run_step = in_process
    first_hour.CHECKS = {name: check for name, check in first_hour.CHECKS.items() if name in checks}
    # Longer than the rows that plain attention takes, GQA, padding.
    attention_kernels.CASES = [((2, 256, 4, 2, 64, 3), None)]
    output = Path(folder) / "told.json"
    code = first_hour.main(["--output", str(output)])
    return code, json.loads(output.read_text())


def wrong(told: dict[str, Any]) -> set[str]:
    return {name for name, step in told["steps"].items() if not all(row["fine"] for row in step["rows"])}


def check_script(folder: str) -> None:
    code, told = script(folder)
    assert code == 0 and not wrong(told), told
    assert (told["machine"]["kind"], told["machine"]["devices"]) == ("cpu", 2)
    assert told["machine"]["versions"].keys() >= {"jax", "jaxlib", "flax", "python", "commit"}
    steps = told["steps"]
    assert steps.keys() == {*SHORT, *(program.name for program in first_hour.PROGRAMS if not program.tpu)}
    for name in SHORT:
        errors = [e for row in steps[name]["rows"] for e in row["errors"].values()]
        assert errors and all(0 < e["error"] < e["bound"] for e in errors)
    for program in [p for p in first_hour.PROGRAMS if not p.tpu]:
        step = steps[program.name]
        assert step["result"] == TIMED and step["command"][-1] == f"--flags={program.flags}"

    # A second start makes again the program whose flags changed and, last, what failed.
    steps["defaults"]["error"] = "cut"
    output = Path(folder) / "told.json"
    output.write_text(json.dumps(told))
    started = []
    first_hour.run_step = lambda command, seconds: started.append(command) or in_process(command, seconds)
    first_hour.PROGRAMS[-1] = first_hour.PROGRAMS[-1]._replace(flags="--remat none")
    assert first_hour.main(["--output", str(output)]) == 0
    assert [command[-1] for command in started] == ["machine", "--flags=--remat none", "--flags="]
    assert "error" not in json.loads(output.read_text())["steps"]["defaults"]


def test_script(tmp_path: Path) -> None:
    on_devices(2, f"test_first_hour.check_script({str(tmp_path)!r})")


def rounded(einsum: Callable) -> Callable:
    """Round operands to bfloat16 in silence, as a TPU does at its default precision."""

    def rounding(form: str, a: Any, b: Any, *others: Any) -> Any:
        a, b = (x.astype("bfloat16").astype(x.dtype) for x in (a, b))
        return einsum(form, a, b, *others)

    return rounding


def mean(gradient: Callable) -> Callable:
    """Take the mean over two devices in the place of the sum."""
    return lambda *args: gradient(*args) / 2


attention = llama_jax.model.attention
# The function to break, how, and the checks that should find it: a factor of the scores 20% off, segments that see each
# other, and so on.
ERRORS: dict[str, tuple[Any, str, Callable, tuple[str, ...]]] = {
    "factor": (attention, "blockwise", lambda f: lambda *a, factor, **o: f(*a, factor=1.2 * factor, **o), SHORT[:2]),
    "segments": (attention, "blockwise", lambda f: lambda q, k, v, i, *a, **o: f(q, k, v, i**0, *a, **o), SHORT[:2]),
    "nan": (attention, "blockwise", lambda f: lambda *a, **o: f(*a, **o) * float("nan"), SHORT[:2]),
    "precision": (matmul, "_einsum", rounded, SHORT[2:3]),
    "mean": (matmul, "weight_gradient", mean, SHORT[2:]),
}


def check_error(name: str, folder: str) -> None:
    module, function, change, expected = ERRORS[name]
    setattr(module, function, change(getattr(module, function)))
    code, told = script(folder, expected)
    assert code == 1 and wrong(told) == {*expected}, told


@pytest.mark.parametrize("name", [slow_unless(name == "precision", name) for name in ERRORS])
def test_an_error_is_found(name: str, tmp_path: Path) -> None:
    on_devices(2, f"test_first_hour.check_error({name!r}, {str(tmp_path)!r})")


def check_golden(folder: str, error: bool) -> None:
    if error:
        matmul._einsum = rounded(matmul._einsum)
    code, told = script(folder, ("the Trainer's curve",))
    rows = told["steps"]["the Trainer's curve"]["rows"]
    assert len(rows) == 20 and code == error
    assert not error or not all(row["fine"] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("error", [False, True])
def test_the_trainers_curve(error: bool, tmp_path: Path) -> None:
    on_devices(2, f"test_first_hour.check_golden({str(tmp_path)!r}, {error})")


@pytest.mark.proof
def test_the_whole_script(tmp_path: Path) -> None:
    """Every step as a user starts it, in its own process."""
    output = tmp_path / "told.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "first_hour.py"), "--output", str(output)]
    made = subprocess.run(command, env=environment() | of_devices(2), capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    told = json.loads(output.read_text())
    assert not any("error" in step for step in told["steps"].values()) and not wrong(told)
    assert all(
        told["steps"][program.name]["result"]["tokens_s"] > 0 for program in first_hour.PROGRAMS if not program.tpu
    )


def test_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A TPU times all programs, whose flags are those of train_jax.py."""
    flags = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o", "--bf16", "True"]
    for program in first_hour.PROGRAMS:
        options = dict(parse_arguments([*flags, *program.flags.split()]).xla_options)
        assert len(options) == (2 if program.tpu else 0)
    assert len({(program.flags, program.layers) for program in first_hour.PROGRAMS}) == len(first_hour.PROGRAMS)

    commands: dict[str, list[str]] = {}
    machine = {"platform": "tpu", "kind": "TPU v5 lite", "devices": 8, "memory": int(15.75 * GIB)}

    def made_up(command: list[str], seconds: float) -> dict[str, Any]:
        if command[-1] == "machine":
            return {"rows": [], "result": machine}
        commands[command[-1]] = command
        return {"rows": [], "result": TIMED}

    monkeypatch.setattr(first_hour, "run_step", made_up)
    assert first_hour.main(["--output", str(tmp_path / "told.json")]) == 0
    timed = [command for name, command in commands.items() if name.startswith("--flags=")]
    assert [command[-1] for command in timed[:4]] == [f"--flags={p.flags}" for p in first_hour.PROGRAMS[:4]]
    assert timed[1][1:5] == ["--shape", "llama-7b", "--layers", "26"] and "1x2048" in timed[1]


def test_a_step_that_fails_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(command: list[str], seconds: float) -> dict[str, Any]:
        if command[-1] == "machine":
            facts = {"platform": "cpu", "kind": "cpu", "devices": 1, "memory": None}
            return {"rows": [], "result": facts}
        return first_hour.run_step_of(["-c", "print('ROW {}'); raise ValueError('wrong shape')\n"], seconds)

    monkeypatch.setattr(first_hour, "run_step_of", first_hour.run_step, raising=False)
    monkeypatch.setattr(first_hour, "run_step", broken)
    monkeypatch.setattr(first_hour, "CHECKS", dict.fromkeys(SHORT[:1], lambda: ()))
    monkeypatch.setattr(first_hour, "PROGRAMS", first_hour.PROGRAMS[:1])
    output = tmp_path / "told.json"
    assert first_hour.main(["--output", str(output)]) == 1
    steps = json.loads(output.read_text())["steps"]
    assert [(step["rows"], step["error"]) for step in steps.values()] == [([{}], "ValueError: wrong shape")] * 2


def test_a_step_that_hangs_is_stopped() -> None:
    code = "import sys, time; print('ROW {}\\nROW {', end='', flush=True); "
    code += "print('still here', file=sys.stderr, flush=True)"
    code += "; time.sleep(60)"
    found = first_hour.run_step(["-c", code], 2)
    assert found["rows"] == [{}] and found["error"] == "Error: stopped after 2 s" and "still here" in found["stderr"]


GIB = 2**30


@pytest.mark.parametrize(
    ("memory", "devices", "layers"),
    [
        # 12 bytes of 6,738,415,616 parameters are 75.3 GiB, 2.26 each layer, 2.93 outside the layers.
        (15.75 * GIB, 16, 32),
        (31.25 * GIB, 8, 32),
        (15.75 * GIB, 8, 26),
        (15.75 * GIB, 1, 2),
        (1 * GIB, 1, 1),
        (None, 8, 32),
    ],
)
def test_layers_that_fit(memory: int | None, devices: int, layers: int) -> None:
    assert first_hour.fitting_layers("llama-7b", memory, devices) == layers


class Cluster:
    @staticmethod
    def get_process_count() -> int:
        return 4


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--seconds 0"):
        first_hour.main(["--seconds", "0"])
    with pytest.raises(InputError, match="its folder does not exist"):
        first_hour.main(["--output", str(tmp_path / "none" / "told.json")])
    facts, output = {"kind": "TPU v5 lite", "devices": 8, "memory": 1}, tmp_path / "told.json"
    assert first_hour.earlier_steps(output, facts) == {}
    with pytest.raises(InputError, match="is a folder"):
        first_hour.main(["--output", str(tmp_path)])
    for text in ("", "[]", "{}", '{"machine": 1, "steps": {}}', '{"machine": {}, "steps": {"a": 1}}'):
        output.write_text(text)
        with pytest.raises(InputError, match="is not a file of this script"):
            first_hour.earlier_steps(output, facts)
    output.write_text(json.dumps({"machine": facts | {"devices": 4, "memory": 2}, "steps": {"a": {"command": []}}}))
    with pytest.raises(InputError, match="is of other devices; move it away"):
        first_hour.earlier_steps(output, facts)
    assert first_hour.earlier_steps(output, facts | {"devices": 4}) == {"a": {"command": []}}
    monkeypatch.setattr(first_hour, "find_cluster", lambda: Cluster)
    with pytest.raises(InputError, match="on one host, and this slice has 4"):
        first_hour.main(["--output", os.devnull])
