"""The scripts of benchmarks/ run on any machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


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
