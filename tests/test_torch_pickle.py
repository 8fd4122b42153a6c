"""Files that torch.save wrote are read without torch: their tensors bit for bit, and hostile pickles harm nothing."""

import pickle
import re
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import drawn_cases

from llama_jax.base.errors import InputError
from llama_jax.hf.torch_pickle import read_torch

DTYPES = ("float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool")


@given(st.data())
@settings(max_examples=drawn_cases(100))
def test_tensors_of_a_file(data: st.DataObject) -> None:
    """Drawn shapes, types and parts; views into a storage too."""
    import torch

    shape = data.draw(st.lists(st.integers(1, 5), max_size=3))
    dtype = data.draw(st.sampled_from(DTYPES))
    tensor = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 100).to(getattr(torch, dtype))
    cut = data.draw(st.integers(0, shape[0])) if shape else 0
    turned = tensor.T if len(shape) == 2 else tensor
    value = {"turned": turned, "a": [tensor, {"b": (1, 2.5, None, "x", True)}], 3: tensor[cut:] if shape else tensor}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(value, Path(folder) / "x.pt")
        read = read_torch(Path(folder) / "x.pt")
        assert read["a"][1] == value["a"][1]
        bounds = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shape]
        part = tuple(slice(a, b) for a, b in bounds)
        for found, expected in ((read["a"][0], tensor), (read[3], value[3]), (read["turned"], turned)):
            assert found.shape == tuple(expected.shape) and found.dtype.name == dtype
            assert np.array_equal(found.read(()).astype(np.float64), expected.double().numpy())
        assert np.array_equal(read["a"][0].read(part).astype(np.float64), tensor[part].double().numpy())


# -- Hostile files ----------------------------------------------------------------------------------------------------


def zipped(path: Path, pickled: bytes, byteorder: bytes = b"little") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/byteorder", byteorder)
        archive.writestr("x/data/0", bytes(16))
    return path


def opcodes(value: Any) -> bytes:
    """The opcodes that put a plain value on the stack of a pickle."""
    return pickle.dumps(value, 2)[2:-1]


def named(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def tensor_of(shape: Any = (2,), stride: Any = (1,), first: Any = 0, size: Any = 4) -> bytes:
    """The opcodes of a tensor of float32."""
    kind = b"(" + opcodes("storage") + named("torch FloatStorage") + opcodes("0") + opcodes("cpu") + opcodes(size)
    function = named("torch._utils _rebuild_tensor_v2")
    return function + b"(" + kind + b"tQ" + opcodes(first) + opcodes(shape) + opcodes(stride) + b"tR"


def said_alone(path: Path) -> list[str]:
    """What a process of its own says of a file, which may break it, and of the types afterwards."""
    code = """if True:
        import sys
        from pathlib import Path
        import ml_dtypes
        import numpy as np
        from llama_jax.base.errors import InputError
        from llama_jax.hf.torch_pickle import read_torch
        try:
            print("read:", type(read_torch(Path(sys.argv[1]))).__name__)
        except InputError as e:
            print("refused:", e)
        kinds = [ml_dtypes.bfloat16, np.float32, np.float64, np.int64, np.bool_]
        print([(np.dtype(kind).itemsize, np.dtype(kind).isnative) for kind in kinds], type(np.dtype).__name__)"""
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, (ran.returncode, ran.stderr[-500:])
    return ran.stdout.splitlines()


def refused_in_little(path: Path, said: str) -> None:
    """A file is refused, and takes less than 10 MB of memory."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=said):
            read_torch(path)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


SOUND = "[(2, True), (4, True), (8, True), (8, True), (1, True)] _DTypeMeta"
OF_NUMPY = ["numpy dtype", "numpy ndarray", "numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"]
STORAGES = "Float Double Half BFloat16 Byte Char Short Int Long Bool".split()
ALLOWED = ["collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"]
ALLOWED += ["torch Size", "_codecs encode", *OF_NUMPY, *[f"torch {name}Storage" for name in STORAGES]]
# States of a dtype (its byte order; its flags; its size), of an object's dictionary, and of its slots.
STATES = [(3, ">", None, None, None, 2, 2, 64), (3, "|", None, None, None, 1, 1, 63), {"a": 1}, (None, {"_call": 1})]


@pytest.mark.parametrize("name", ALLOWED)
def test_no_name_takes_a_state(name: str, tmp_path: Path) -> None:
    """The reader's own objects and NumPy's types stay as they are. A process of its own reads the worst of the states,
    as it broke the whole process."""
    said = said_alone(zipped(tmp_path / "x.pt", b"\x80\x02" + named(name) + opcodes(STATES[0]) + b"b."))
    assert said[0].startswith("refused: ") and "is damaged" in said[0] and said[1] == SOUND
    for state in STATES[1:]:
        with pytest.raises(InputError, match="is damaged"):
            read_torch(zipped(tmp_path / "x.pt", b"\x80\x02" + named(name) + opcodes(state) + b"b."))


PARAMETER = named("torch._utils _rebuild_parameter")
STORAGE = (
    b"(" + opcodes("storage") + named("torch BFloat16Storage") + opcodes("0") + opcodes("cpu") + opcodes(4) + b"tQ"
)
TAKEN = {  # what the opcodes leave on the stack
    "a tensor": tensor_of(),
    "a storage": STORAGE,
    "a storage's type": PARAMETER + STORAGE + b"R",
    "a function's parts": PARAMETER + named("torch Size") + b"R",
    "a dictionary": b"}",
    "a list": b"]",
}


@pytest.mark.parametrize("what", TAKEN)
def test_no_value_takes_a_state(what: str, tmp_path: Path) -> None:
    for state in [STATES[0], {"shape": (9,), "dtype": 1}]:
        said = said_alone(zipped(tmp_path / "x.pt", b"\x80\x02" + TAKEN[what] + opcodes(state) + b"b."))
        assert said[0].startswith("refused: ") and said[1] == SOUND


def test_states_of_torchs_own_files(tmp_path: Path) -> None:
    """The `_metadata` of a model's state, and NumPy's own values, are dropped, and hide nothing of the rest."""
    import torch

    state = torch.nn.Linear(2, 3).state_dict()
    for protocol in (2, 3, 4, 5):
        value = {"m": state, "s": torch.Size([2])} | ({"n": np.arange(3)} if protocol < 5 else {})
        torch.save(value, tmp_path / "x.pt", pickle_protocol=protocol)
        read = read_torch(tmp_path / "x.pt")
        assert list(read["m"]) == ["weight", "bias"] and read["s"] == (2,)
        assert np.array_equal(read["m"]["weight"].read(()), state["weight"].numpy())
    setting = named("collections OrderedDict") + b")R" + opcodes({"items": 1, "get": 2}) + b"b."
    read = read_torch(zipped(tmp_path / "x.pt", b"\x80\x02" + setting))
    assert list(read.items()) == [] and read.get("a") is None


@pytest.mark.parametrize("index", [3, 5_000_000])
def test_a_memo_of_no_values(index: int, tmp_path: Path) -> None:
    """A place of the memo takes 8 bytes, and the unpickler makes twice as many as it needs."""
    path = zipped(tmp_path / "x.pt", b"\x80\x02Nr" + struct.pack("<I", index) + b".")
    refused_in_little(path, "its pickle counts more values than it has")


@pytest.mark.parametrize("order", [b"big", b"big" * (10 << 20), b""], ids=["big", "huge", "empty"])
def test_orders_of_bytes(order: bytes, tmp_path: Path) -> None:
    refused_in_little(zipped(tmp_path / "x.pt", b"\x80\x02N.", order), "its numbers are not little-endian")


BAD: dict[str, tuple[Any, ...]] = {
    "shape": ((2.0,),),
    "a bool": ((True,),),
    "stride": ((2,), (1.0,)),
    "first": ((2,), (1,), 0.0),
    "size": ((2,), (1,), 0, 4.0),
    "negative": ((2,), (1,), -1),
    "axes": ((1,) * 65, (1,) * 65),
    "past int64": ((0, 1 << 63), (1, 1)),
}


@pytest.mark.parametrize("name", BAD)
def test_tensors_of_no_numbers(name: str, tmp_path: Path) -> None:
    assert read_torch(zipped(tmp_path / "x.pt", b"\x80\x02" + tensor_of() + b".")).read(()).tolist() == [0, 0]
    with pytest.raises(InputError, match="is damaged"):
        read_torch(zipped(tmp_path / "x.pt", b"\x80\x02" + tensor_of(*BAD[name]) + b"."))


@pytest.mark.parametrize("shape", [(1, 2, 2), (0, 2, 2)])
def test_strides_of_no_step(shape: tuple[int, ...], tmp_path: Path) -> None:
    """An axis that takes no step may have any stride; NumPy's are below 2**63 bytes."""
    far = tensor_of(shape, (1 << 62, 1, 2)) if shape[0] else tensor_of(shape, (1, 1 << 62, 1))
    assert read_torch(zipped(tmp_path / "x.pt", b"\x80\x02" + far + b".")).read(()).shape == shape


def test_opcodes_of_no_torch_file(tmp_path: Path) -> None:
    """Of the protocols that torch's are not, and those that call a class in other ways."""
    for data in (b"Np0\n.", b"(iposix\nsystem\n.", b"\x82\x01.", b"I1\n.", b"\x97."):
        with pytest.raises(InputError, match=r"is damaged .*, which torch's do not"):
            read_torch(zipped(tmp_path / "x.pt", b"\x80\x02" + data))


def test_whole_files_of_other_kinds(tmp_path: Path) -> None:
    """They are not called damaged, and the key is said where one stands before the name."""
    import torch

    noted = torch.nn.Parameter(torch.ones(2))
    noted.note = "x"  # type: ignore[attr-defined]
    values: dict[str, Any] = {
        "torch.nn.modules.linear.Linear,": torch.nn.Linear(2, 3),
        "torch._utils._rebuild_parameter_with_state in 'w',": {"v": torch.ones(2), "w": noted},
        "torch._utils._rebuild_tensor_v3 in 'w',": {"w": torch.nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn))},
        "torch._utils._rebuild_sparse_tensor in 'w',": {"v": torch.ones(2), "w": torch.ones(2).to_sparse()},
        "torch._utils._rebuild_sparse_tensor,": {"v": 1, 3: torch.ones(2).to_sparse()},
        "torch.ComplexFloatStorage in 'w',": {"w": torch.ones(2, dtype=torch.complex64)},
    }
    for said, value in values.items():
        torch.save(value, tmp_path / "x.pt")
        with pytest.raises(InputError, match=re.escape(f"x.pt: it names {said} which this reader does not take")):
            read_torch(tmp_path / "x.pt")
