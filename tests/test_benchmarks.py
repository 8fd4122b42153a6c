"""The scripts of benchmarks/ run on any machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_hlo import COMPILED, SCHEDULE
from test_training import Job

from llama_jax.plan.chips import find_topology

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import tpu_compiler  # noqa: E402


@pytest.mark.proof
def test_speed_beside_a_peer(tmp_path: Path) -> None:
    """Time a tiny shape: a run ends when its time is over, all tokens of whole sequences count, and Alpaca updates have
    the same number of examples in each run."""
    pytest.importorskip("torch")
    flags = "--shape tiny --work 2x64 alpaca --peers trainer --updates 300 --seconds 0.5".split()
    flags += ["--flags", "--use_cpu True --max_tokens_per_device 2048 --remat none"]
    flags += ["--json", str(tmp_path / "told.json")]
    command = [sys.executable, str(BENCHMARKS / "speed.py"), *flags]
    as_users = {**os.environ, "XLA_FLAGS": ""}  # compiled to be fast
    made = subprocess.run(command, env=as_users, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-3000:]
    told = json.loads((tmp_path / "told.json").read_text())
    assert [(r["work"], r["run"]) for r in told] == [
        (work, run) for work in ("2x64", "alpaca") for run in ("ours", "trainer")
    ], made.stderr[-3000:]
    for r in told:
        assert 2 <= r["updates"] < 300
        assert r["tokens_s"] == pytest.approx(r["tokens_an_update"] / r["ms"] * 1000)
    assert [r["tokens_an_update"] for r in told[:2]] == [128, 128]
    assert all(8 * 30 <= r["tokens_an_update"] <= 8 * 512 for r in told[2:])


@pytest.mark.slow
def test_curves(tmp_path: Path) -> None:
    """The first losses are equal, before an update by either optimizer; the table has the means of the losses."""
    job = Job(tmp_path, use_cpu=True)
    command = [sys.executable, str(BENCHMARKS / "curves.py"), "--model", str(job.folder / "model"), "--data_path"]
    command += [str(job.folder / "data.json"), "--updates", "3", "--common", "--use_cpu True --learning_rate 1e-2"]
    command += ["--flags", "", "--optim sgd", "--json", str(tmp_path / "told.json")]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-3000:]
    none, other = json.loads((tmp_path / "told.json").read_text()).values()
    assert len(none) == 3 and none[0] == other[0] and none[2] != other[2]
    rows = made.stdout.splitlines()[2:]
    assert f"{np.mean(none):.4f} (+0.000%)" in rows[0]
    assert f"{np.mean(other):.4f} ({np.mean(other) / np.mean(none) - 1:+.3%})" in rows[1]


def test_a_row_of_another_program(tmp_path: Path) -> None:
    """Figures of a dumped program, whose cycles are milliseconds of a chip of 1.5 GHz. The attention: 9 products of 32
    heads of 128, half of 2,048 x 2,048 scores, in 32 layers, are 4.95 TFLOP of 197 a second; nothing waits."""

    def in_ms(pattern: str, text: str) -> str:
        return re.sub(pattern, lambda found: f"{found[1]}{float(found[2]) * 1_500_000:.0f}", text)

    (tmp_path / "jit_step.schedule.txt").write_text(in_ms(r"(_cycles: )([\d.]+)", SCHEDULE))
    compiled = in_ms(r'("estimated_cycles":")(\d+)', COMPILED)
    (tmp_path / "module_0001.jit_step.cl_1.after_codegen.txt").write_text(compiled)
    report = f"Memory Space: vmem\nTotal bytes: 7\nMemory Space: default (color=0)\nTotal bytes: {3 * 2**30} (3GiB)\n"
    (tmp_path / "module_0001.jit_step.cl_1.after_optimizations-memory-usage-report.txt").write_text(report)
    args = tpu_compiler.parse(["--read", str(tmp_path), "--name", "other", "v5e-4"])
    row = tpu_compiler.others(args, find_topology("v5e-4"))
    expected = "3.00 of 15.44 | 166 (60 / 6 / 100) | 80 + 120 | 25 | 191 (191 + 0) | 0.0 (0.0, 0.0) | "
    expected += "kernel_fwd_residuals 7 |  |"
    assert row == f"| other |  | {expected}"


@pytest.mark.proof
def test_a_row_of_ours(libtpu: None) -> None:
    """A tiny step by the TPU's compiler, on four chips: fits, waits for links, and sends what it sends."""
    command = [sys.executable, str(BENCHMARKS / "tpu_compiler.py"), "--shape", "tiny", "--work", "1x128", "v5e-4"]
    paths = os.environ | {"PYTHONPATH": f"{Path(sys.prefix) / 'libtpu'}:{BENCHMARKS.parent}"}
    made = subprocess.run(command, env=paths, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-3000:]
    row = made.stdout.splitlines()[-1].split("|")
    assert row[1].strip() == "v5e-4" and float(row[3].split()[0]) < 1, row
    assert re.fullmatch(r" [\d,]+ \+ [\d,]+ ", row[5]), row
    assert re.fullmatch(r" [\d,]+ \([\d,]+ \+ [\d,]+\) ", row[7]), row


@pytest.mark.proof
def test_roundings_to_fp8(shared: Path) -> None:
    """Before an update nothing but the rounding differs: gradients' rounding changes no loss then, inputs' does."""
    data = shared / "data"
    command = [sys.executable, str(BENCHMARKS / "fp8_rounding.py"), "--model", str(data / "stories260K")]
    command += ["--data_path", str(data / "alpaca" / "alpaca_data.json")]
    command += "--updates 1 --runs inputs gradients".split()
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-3000:]
    rows = {row.split(" | ")[0]: re.findall(r"\(([+-][\d.]+%)\)", row) for row in made.stdout.splitlines()[2:]}
    assert rows["| nothing"] == rows["| gradients"] == ["+0.00%"] * 3  # the first update has a rate of 0
    assert rows["| inputs"][0] != "+0.00%" and rows["| inputs"][2] == "+0.00%", rows
