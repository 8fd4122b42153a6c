"""Test the meshes of `--mesh`."""

import itertools
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny import CONFIG, hf_shapes, make_records, run, write_json, write_model

import train_jax
from llama_jax.base.errors import InputError
from llama_jax.distributed import sharding
from llama_jax.distributed.sharding import mesh_sizes
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define
from llama_jax.model.llama import RunOptions
from llama_jax.plan.chips import Named
from llama_jax.training.step import _layer_gradient_bytes


def test_every_layout_by_its_name() -> None:
    """Give all sizes, omit sizes of 1, or set one axis to -1: the mesh is the same."""
    for devices in (1, 2, 6, 8, 256):
        divisors = [n for n in range(1, devices + 1) if devices % n == 0]
        for sizes in itertools.product(divisors, repeat=4):
            if math.prod(sizes) != devices or sizes[2] not in (1, 2, 4, 8, 16, 32, 64, 128):
                continue
            named = dict(zip(("data", "fsdp", "context", "tensor"), sizes, strict=True))
            short = {axis: size for axis, size in named.items() if size > 1} or {"data": 1}
            spellings = [named, short, *({**named, axis: -1} for axis in named)]
            for spelling in spellings:
                spec = ",".join(f"{axis}={size}" for axis, size in spelling.items())
                assert mesh_sizes(spec, devices) == named, spec
    assert mesh_sizes("auto", 8) == {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}
    assert mesh_sizes(" tensor = 2 , data=-1", 8) == {"data": 4, "fsdp": 1, "context": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "unknown axis ''; give auto"),
        ("8", "unknown axis '8'"),
        ("model=8", "unknown axis 'model'; give auto, or sizes of data, fsdp, context, tensor"),
        ("fsdp", "the size of fsdp should be a number above 0, or -1, as in fsdp=2"),
        ("fsdp=", "the size of fsdp"),
        ("fsdp=0", "the size of fsdp"),
        ("fsdp=-2", "the size of fsdp"),
        ("fsdp=4.0", "the size of fsdp"),
        ("fsdp=8,", "unknown axis ''"),
        ("auto,fsdp=8", "unknown axis 'auto'"),
        ("fsdp=2,fsdp=4", "fsdp is given twice"),
        ("data=-1,fsdp=-1", "data and fsdp are -1; only one axis may be"),
        ("data=2,fsdp=2", "needs 4 device(s), but there are 8; set one axis to -1"),
        ("fsdp=16", "needs 16 device(s), but there are 8"),
        ("tensor=3,fsdp=-1", "needs a multiple of 3 device(s), but there are 8"),
        ("context=6", "context=6 should be a power of two, up to 128"),
        ("context=256", "context=256 should be a power of two, up to 128"),
    ],
)
def test_a_mesh_that_is_none(spec: str, said: str) -> None:
    with pytest.raises(InputError, match="--mesh") as caught:
        mesh_sizes(spec, {"context=6": 6, "context=256": 256}.get(spec, 8))
    assert said in str(caught.value) and "\n" not in str(caught.value)


class Chip:
    """Imitate a TPU device for `make_mesh`: 2 x 2 x 1 chips in each of three slices."""

    platform, device_kind, core_on_chip, process_index = "tpu", "TPU v5p", 0, 0

    def __init__(self, number: int):
        self.id, self.slice_index = number, number // 4
        self.coords = (number % 2, number // 2 % 2, 0)


def test_between_slices_runs_data() -> None:
    chips = [Chip(i) for i in range(12)]
    for spec, sizes in (
        ("auto", {"data": 3, "fsdp": 4, "context": 1, "tensor": 1}),
        ("data=-1,tensor=2", {"data": 6, "fsdp": 1, "context": 1, "tensor": 2}),
        ("data=3,context=2,tensor=2", {"data": 3, "fsdp": 1, "context": 2, "tensor": 2}),
    ):
        mesh = sharding.make_mesh(chips, spec)
        assert dict(mesh.shape) == sizes
        per_slice = mesh.devices.reshape(3, 4)  # data comes first
        assert [{chip.slice_index for chip in row} for row in per_slice] == [{0}, {1}, {2}]
    with pytest.raises(InputError, match="--mesh fsdp=12: on 3 TPU slices, data should be a multiple of 3"):
        sharding.make_mesh(chips, "fsdp=12")


def test_the_mesh_is_explicit() -> None:
    mesh = sharding.make_mesh(jax.devices()[:1], "data=-1")
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
    assert all(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types)


def test_a_mistake_stops_the_command_first(tmp_path: Path) -> None:
    flags = ("--model_name_or_path", tmp_path / "model", "--data_path", tmp_path / "data.json", "--use_cpu", True)
    outcome = run(train_jax.main, *flags, "--output_dir", tmp_path / "out", "--mesh", "fsdp=2")
    assert outcome.code == 2 and outcome.compiled == 0
    assert outcome.err.splitlines()[-1].startswith("error: --mesh fsdp=2: needs 2 device(s), but there are 1")
    assert not (tmp_path / "out").exists()


def test_the_start_says_the_mesh(tmp_path: Path) -> None:
    model, data = write_model(tmp_path / "model"), write_json(tmp_path / "data.json", make_records(4))
    flags = ("--model_name_or_path", model, "--data_path", data, "--output_dir", tmp_path / "out", "--use_cpu", True)
    outcome = run(train_jax.main, *flags, "--max_steps", 1, "--save_strategy", "no", "--mesh", "tensor=1")
    assert outcome.code == 0, outcome.err
    assert "devices: 1 cpu device(s) of 1 process(es), mesh fsdp=1" in outcome.err


def test_rows_of_the_vocabulary() -> None:
    """Round up to a multiple of 128 and of the axes that divide the embedding and the head."""
    for vocab_size, rows in ((1, 128), (128, 128), (129, 256), (32000, 32000), (32001, 32128)):
        with jax.set_mesh(sharding.make_mesh(jax.devices()[:1])):
            assert sharding.vocab_rows(vocab_size) == rows
    for *sizes, rows in ((8, 1, 1, 32128), (256, 1, 1, 32256), (64, 4, 1, 32256), (3, 1, 2, 32256), (1, 1, 5, 32640)):
        abstract = jax.sharding.AbstractMesh((1, *sizes), sharding.AXES)
        with jax.sharding.use_abstract_mesh(abstract):
            assert sharding.vocab_rows(32001) == rows


def test_where_gradients_are_exchanged() -> None:
    """Exchange within a process only, and never on a TPU."""
    for platform, a_process, spec, exchanges in (
        ("gpu", 8, "fsdp=8", True),
        ("cpu", 8, "fsdp=4,context=2", True),
        ("tpu", 8, "fsdp=8", False),
        ("gpu", 4, "fsdp=8", False),
        ("gpu", 4, "data=2,fsdp=4", True),
        ("gpu", 4, "data=2,fsdp=2,context=2", True),
        ("gpu", 4, "data=2,context=2,tensor=2", True),
        ("gpu", 4, "fsdp=4,tensor=2", False),
        ("gpu", 1, "data=8", True),
        ("gpu", 1, "fsdp=2,tensor=4", False),
    ):
        devices = [Named(i, platform, "some kind", i // a_process) for i in range(8)]
        mesh = Mesh(np.array(devices).reshape(*mesh_sizes(spec, 8).values()), sharding.AXES)
        assert sharding.exchanges(mesh) == exchanges, (platform, a_process, spec)


def test_a_layers_gradients() -> None:
    """Count the matrices of one layer in float32, stacked or not."""
    config, mesh = LlamaConfig.from_hf({**CONFIG, "num_hidden_layers": 10}), sharding.make_mesh()
    shapes = hf_shapes({**CONFIG, "num_hidden_layers": 10})
    layer = [shape for name, shape in shapes.items() if ".layers.3." in name and len(shape) == 2]
    for scanned in (False, True):
        params = define(config, RunOptions(scan_layers=scanned), mesh).params
        assert _layer_gradient_bytes(params) == 4 * sum(map(math.prod, layer)), scanned
