"""`manifest.json` and `python -m llama_jax.parity --verify`: right folders hold, and each damage is named."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from forks import on_devices
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import (
    ALPACA,
    CONFIG,
    SISTERS,
    Outcome,
    drawn_cases,
    environment,
    make_arrays,
    run,
    write_json,
    write_model,
    write_tokenizer,
)

import llama_jax.hf.convert
import llama_jax.hf.peft
import llama_jax.run.manifest
from llama_jax.base.errors import InputError
from llama_jax.command import convert, parity, train
from llama_jax.distributed import sharding
from llama_jax.hf.manifest import MANIFEST, _numbers, base_of, choose_columns, choose_prompts, read_manifest, reader
from llama_jax.hf.names import name_table
from llama_jax.hf.source import Source
from llama_jax.model.llama import RunOptions
from llama_jax.model.prompt_logits import PromptLogits, prompt_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

Q0 = "model.layers.0.self_attn.q_proj.weight"
A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(autouse=True)
def quiet() -> None:
    torch.set_num_threads(1)


def to_hf(folder: Path, *flags: str) -> Path:
    """A converted model: the same writer as at the end of a run, and no training program to compile."""
    model = write_tokenizer(write_model(folder / "model"))
    assert run(convert.main, "--model_name_or_path", model, "--output_dir", folder / "flax").code == 0
    argv = ["--to_hf", "--model_name_or_path", folder / "flax", "--output_dir", folder / "out", *flags]
    outcome = run(convert.main, *argv)
    assert outcome.code == 0, outcome.err
    return folder / "out"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_hf(tmp_path_factory.mktemp("whole"))


def trained(folder: Path, *flags: Any) -> Path:
    """A run that trains an adapter, its base in folder/model."""
    argv = ["--model_name_or_path", folder / "model", "--data_path", write_json(folder / "data.json", ALPACA)]
    argv += ["--output_dir", folder / "out", "--max_steps", 2, "--per_device_train_batch_size", 2, "--use_cpu", "True"]
    argv += ["--use_peft", "True", "--lora_r", 4, "--lora_dropout", 0.1, "--learning_rate", 0.1, *flags]
    outcome = run(train.main, *argv)
    assert outcome.code == 0, outcome.err
    return folder / "out"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    write_tokenizer(write_model(folder / "model"))
    return trained(folder, "--save_steps", 2)


def verify(folder: Path, *flags: Any) -> Outcome:
    return run(parity.main, "--verify", folder, *flags)


def assert_holds(outcome: Outcome, rows: int) -> None:
    """The bounds are those of rounding: a reference that is off by itself would make them wide."""
    assert outcome.code == 0 and f"parity: all {rows} rows hold" in outcome.out, outcome.out + outcome.err
    bounds = [float(line.split()[3]) for line in outcome.out.splitlines() if re.search(r"\de-\d\d +holds|\+00 ", line)]
    assert len(bounds) == 3 and max(*bounds[:2], bounds[2] / 2) < 1e-4, outcome.out  # of likeliest tokens: twice


def failing(outcome: Outcome) -> list[str]:
    """The rows that fail, as they are printed."""
    assert outcome.code == 1, outcome.out + outcome.err
    return [line.strip() for line in outcome.out.splitlines() if " FAILS" in line]


def assert_near(found: PromptLogits, theirs: np.ndarray, columns: list[int]) -> None:
    """Compare with logits [T, V] of another program in float32.

    Two layers of sums of at most 48 products, each rounded at 2^-24 of itself: 1e-5 of the largest logit is 20 times
    the error measured, 5e-7, and a thousandth of what one wrong weight does.
    """
    bound = 1e-5 * np.abs(theirs).max()
    np.testing.assert_allclose(found.chosen, theirs[:, columns], rtol=0, atol=bound)
    np.testing.assert_allclose(found.largest, np.abs(theirs).max(-1), rtol=0, atol=bound)
    below = theirs.max(-1) - np.take_along_axis(theirs, found.likeliest[:, None].astype(int), -1)[:, 0]
    assert below.max() <= 2 * bound


# --- right folders -------------------------------------------------------------------------------------------------


def test_a_manifest_by_other_readers(whole: Path) -> None:
    """Digests by hashlib over safetensors' own reading, ids by AutoTokenizer, logits by transformers."""
    values, manifest = json.loads((whole / MANIFEST).read_text()), read_manifest(whole)
    with safe_open(whole / "model.safetensors", "np") as file:
        assert {*file.keys()} == values["tensors"].keys()
        for name, entry in values["tensors"].items():
            array = file.get_tensor(name)
            assert entry == {
                "file": "model.safetensors",
                "dtype": "float32",
                "shape": list(array.shape),
                "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
            }
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= manifest.files.keys()
    for name, digest in manifest.files.items():
        assert digest == hashlib.sha256((whole / name).read_bytes()).hexdigest()
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole)
    model = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    assert len(manifest.prompts) == 3 and len(manifest.columns) == 64 and manifest.columns[-1] == 258
    for prompt, found in zip(manifest.prompts, manifest.logits, strict=True):
        assert prompt.ids == tokenizer(prompt.text)["input_ids"]
        with torch.no_grad():
            assert_near(found, model(torch.tensor([prompt.ids])).logits[0].numpy(), manifest.columns)
    assert manifest.data is None and manifest.base is None and manifest.flags["to_hf"] is True
    assert (whole / MANIFEST).stat().st_size < 100_000


def test_a_folder_holds(whole: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(whole, tmp_path / "copied")
    outcome = verify(copied)
    assert_holds(outcome, 11)
    assert " 21 tensors " in outcome.out and "ids of 'The sea is deep, and'" in outcome.out


def test_an_adapter_holds(adapted: Path, tmp_path: Path) -> None:
    """Its base may lie elsewhere at the receiver's. PEFT's own loading gives the logits."""
    copied = shutil.copytree(adapted, tmp_path / "copied", ignore=shutil.ignore_patterns("checkpoint-*"))
    moved = shutil.copytree(adapted.parent / "model", tmp_path / "base")
    for flags in ([], ["--model_name_or_path", moved]):
        assert_holds(verify(copied, *flags), 12)
    manifest = read_manifest(copied)
    assert manifest.base and manifest.base["name"] == str(adapted.parent / "model")
    assert manifest.data and manifest.data["names"] == ["data.json"] and len(manifest.data["digest"]) >= 32
    assert manifest.flags["lora_r"] == 4 and manifest.versions["jax"] == jax.__version__
    from peft import PeftModel

    base = transformers.AutoModelForCausalLM.from_pretrained(moved, dtype=torch.float32)
    prompt, found = manifest.prompts[0], manifest.logits[0]
    with torch.no_grad():
        plain = base(torch.tensor([prompt.ids])).logits[0].numpy()
        theirs = PeftModel.from_pretrained(base, copied).eval()(torch.tensor([prompt.ids])).logits[0].numpy()
    assert_near(found, theirs, manifest.columns)
    assert np.abs(found.chosen - plain[:, manifest.columns]).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "pad_token", "flags"),
    [
        ({}, "<unk>", ["--use_dora", "True", "--lora_target_modules", "q_proj,down_proj"]),
        ({}, "<unk>", ["--lora_modules_to_save", "embed_tokens,lm_head"]),
        ({}, "<unk>", ["--lora_modules_to_save", "lm_head", "--bf16", "True", "--scan_layers", "True"]),
        ({}, None, ["--bf16", "True"]),
        ({"tie_word_embeddings": True}, None, []),
        ({"hidden_size": 64, "intermediate_size": 128}, "<unk>", ["--load_in_4bit", "True", "--bf16", "True"]),
        (SISTERS["qwen3, biases"], "<unk>", ["--scan_layers", "True", "--bf16", "True"]),
        (SISTERS["granite"], "<unk>", ["--lora_target_modules", "all-linear"]),
    ],
    ids=["dora", "saved", "saved head", "grown", "grown, tied", "4 bits", "qwen3, stacked", "granite"],
)
def test_adapters_hold(config: dict[str, Any], pad_token: str | None, flags: list[str], tmp_path: Path) -> None:
    """The base is read from its files: the run may hold it rounded, or in 4 bits."""
    write_tokenizer(write_model(tmp_path / "model", {**CONFIG, **config}), pad_token=pad_token)
    assert_holds(verify(trained(tmp_path, "--save_strategy", "no", *flags)), 12)


@pytest.mark.slow
def test_merged_and_rounded_folders_hold(adapted: Path, tmp_path: Path) -> None:
    """Logits are of the weights as the files hold them."""
    argv = ["--model_name_or_path", adapted.parent / "model", "--merge_adapter", adapted, "--dtype", "bfloat16"]
    assert run(convert.main, *argv, "--output_dir", tmp_path / "merged").code == 0
    for folder in (tmp_path / "merged", to_hf(tmp_path, "--dtype", "float16")):
        assert_holds(verify(folder), 11)


@pytest.mark.slow
def test_without_a_device(adapted: Path) -> None:
    """--verify makes no jax backend; the command in a process of its own."""
    check = (
        "from jax._src.xla_bridge import backends_are_initialized as made; import sys; sys.exit(10 if made() else 0)"
    )
    code = (
        f"import sys; from llama_jax.command.parity import main; code = main(sys.argv[1:]); assert code == 0; {check}"
    )
    made = subprocess.run([sys.executable, "-c", code, "--verify", adapted], env=environment(), check=False)
    assert made.returncode == 0


def test_a_model_without_a_tokenizer() -> None:
    """The prompts are ids, spread over the vocabulary."""
    prompts = choose_prompts(None, 100)
    assert [len(p.ids) for p in prompts] == [8] * 3 and prompts[0].text is None
    assert (prompts[0].ids[0], prompts[-1].ids[-1]) == (0, 99)
    assert choose_columns(5) == [0, 1, 2, 3, 4]


def after(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, act: Callable[[], Any]) -> None:
    """Let `act` happen at the end of a function."""
    plain = getattr(module, name)

    def both(*args: Any, **more: Any) -> Any:
        result = plain(*args, **more)
        act()
        return result

    monkeypatch.setattr(module, name, both)


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


# --- damages -------------------------------------------------------------------------------------------------------


def change_json(path: Path, change: Callable[[Any], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def flip_bit(folder: Path, file: str = "model.safetensors", name: str = Q0) -> None:
    """Flip the lowest bit of a tensor's last element, in the file's bytes."""
    path = folder / file
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    data[8 + size + header[name]["data_offsets"][1] - 4] ^= 1
    path.write_bytes(data)


def rename(folder: Path) -> None:
    arrays = load_file(folder / "model.safetensors")
    arrays[Q0.replace("q_proj", "x_proj")] = arrays.pop(Q0)
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


def swap_tokens(folder: Path) -> None:
    def swap(values: Any) -> None:
        vocabulary = values["model"]["vocab"]
        vocabulary["e"], vocabulary["o"] = vocabulary["o"], vocabulary["e"]

    change_json(folder / "tokenizer.json", swap)


def put_adapter(folder: Path) -> None:
    """The manifest has the file's right digest: the folder is wrong all the same."""
    (folder / "adapter_config.json").write_text("{}")
    save_file({"x": np.zeros(2, np.float32)}, folder / "adapter_model.safetensors")
    digest = hashlib.sha256(b"{}").hexdigest()
    change_json(folder / MANIFEST, lambda values: values["files"].update({"adapter_config.json": digest}))


OTHERS = ("consolidated.00.pth", "flax_model.msgpack", "model.gguf", "tf_model.h5")
PASSED_OVER = (
    "is a file of weights that the manifest does not name: transformers passes over it, and other programs may read it "
    "in the place of the manifest's; remove it"
)
DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a bit": (flip_bit, [f"{Q0} FAILS: has other bytes"]),
    "a token's id": (
        swap_tokens,
        ["tokenizer.json FAILS: has other bytes", "ids of 'The sea is deep, and' FAILS: the manifest, token 3: ",
         "ids of 'Grüße aus Köln: 你好!' FAILS", "ids of 'def double(x): return 2 *' FAILS"],
    ),
    "eps": (
        lambda folder: change_json(folder / "config.json", lambda c: c.update(rms_norm_eps=2e-5)),
        ["config.json FAILS: has other bytes", "chosen columns", "largest magnitudes"],
    ),
    "a name": (
        rename,
        [f"{Q0} FAILS: is missing; model.safetensors had it", f"{Q0.replace('q_', 'x_')} FAILS: is not in the manifest",
         "chosen columns FAILS: cannot be computed: "],
    ),
    "a file gone": (
        lambda folder: (folder / "tokenizer_config.json").unlink(),
        ["tokenizer_config.json FAILS: is missing"],
    ),
    "a folder for a file": (
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
        ["config.json FAILS: cannot be read: Is a directory", "chosen columns FAILS: cannot be computed: "],
    ),
    "a new template": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        ["chat_template.jinja FAILS: is not in the manifest"],
    ),
    "a new shard": (
        lambda folder: save_file({"x": np.zeros(2, np.float32)}, folder / "model-00002-of-00002.safetensors"),
        [f"model-00002-of-00002.safetensors FAILS: {PASSED_OVER}"],
    ),
    "pickled weights": (
        lambda folder: (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b""),
        [f"pytorch_model-00001-of-00002.bin FAILS: {PASSED_OVER}"],
    ),
    "weights of other programs": (
        lambda folder: ([(folder / name).write_bytes(b"") for name in OTHERS], (folder / "adapter_model").mkdir()),
        [f"{name} FAILS: {PASSED_OVER}" for name in OTHERS],
    ),
    "an adapter on top": (
        put_adapter,
        ["transformers loads it, too; remove it", "adapter_config.json FAILS: is in the folder of a"],
    ),
    "half a file": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4]),
        ["model.safetensors FAILS: ", *["FAILS: is missing; model.safetensors had it"] * 21,
         "chosen columns FAILS: cannot be computed: Error while deserializing header"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_is_named(damage: str, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "copied")
    change, expected = DAMAGES[damage]
    change(folder)
    rows = [" ".join(row.split()) for row in failing(verify(folder))]
    assert len(rows) == len(expected), rows
    for row, part in zip(rows, expected, strict=True):
        assert part in row


def loaded(folder: Path, **options: Any) -> np.ndarray:
    """A tensor of the model that transformers reads from a folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.state_dict()[Q0].numpy()


def test_a_second_set_of_weights(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row tells what transformers does with the file; where it passes over it, all other rows hold."""
    arrays = load_file(whole / "model.safetensors")
    other = {name: array + np.float32(1) for name, array in arrays.items()}

    pickled = shutil.copytree(whole, tmp_path / "pickled")
    torch.save({name: torch.tensor(array) for name, array in other.items()}, pickled / "pytorch_model.bin")
    assert np.array_equal(loaded(pickled), arrays[Q0])
    assert np.array_equal(loaded(pickled, use_safetensors=False), other[Q0])
    (row,) = failing(verify(pickled))
    assert " ".join(row.split()) == f"pytorch_model.bin FAILS: {PASSED_OVER}"

    shards = shutil.copytree(whole, tmp_path / "shards")
    small = partial(llama_jax.hf.convert.write_weights, shard_bytes=20_000)
    monkeypatch.setattr(llama_jax.hf.convert, "write_weights", small)
    llama_jax.hf.convert.to_hf(Source(whole.parent / "flax"), shards, dtype=None, verify=False, flags={})
    save_file(other, shards / "model.safetensors", metadata={"format": "pt"})
    assert np.array_equal(loaded(shards), other[Q0])
    first, *rest = failing(verify(shards))
    assert "transformers reads it in the place of the manifest's shards; remove it" in first
    assert any(row.startswith("chosen columns") for row in rest)


def test_other_logits_are_named(whole: Path, tmp_path: Path) -> None:
    """Of one logit, of a likeliest token, and of a largest magnitude, whatever the files are."""
    folder = shutil.copytree(whole, tmp_path / "copied")
    right = (folder / MANIFEST).read_text()
    for row, change in {
        "chosen columns": lambda prompt: prompt["logits"][3].__setitem__(7, prompt["logits"][3][7] + 1e-3),
        "likeliest tokens": lambda prompt: prompt["likeliest"].__setitem__(0, (prompt["likeliest"][0] + 1) % 259),
        "largest magnitudes": lambda prompt: prompt["largest"].__setitem__(2, prompt["largest"][2] + 1e-3),
    }.items():
        (folder / MANIFEST).write_text(right)
        change_json(folder / MANIFEST, lambda values, change=change: change(values["prompts"][1]))
        (failed,) = failing(verify(folder))
        assert failed.startswith(row)
        assert "worst at prompt 2, token 3" in failed or row != "chosen columns"
    for change in (
        lambda values: values["columns"].__setitem__(-1, 259),
        lambda values: values["prompts"][1]["likeliest"].__setitem__(0, 259),
    ):  # of a model of 259
        (folder / MANIFEST).write_text(right)
        change_json(folder / MANIFEST, change)
        (failed,) = failing(verify(folder))
        assert failed.endswith("the model has 259 rows of the vocabulary, and the manifest names more")
    # A NaN in the manifest alone hides nothing.
    for key, at in (("logits", 0), ("largest", None)):
        (folder / MANIFEST).write_text(right)

        def spoil(values: Any, key: str = key, at: int | None = at) -> None:
            found = values["prompts"][1][key]
            (found if at is None else found[at]).__setitem__(0, None)

        change_json(folder / MANIFEST, spoil)
        (failed,) = failing(verify(folder))
        assert failed.startswith("NaN and Inf")


@pytest.mark.parametrize("tensor", ["lm_head.weight", "model.embed_tokens.weight", Q0])
def test_weights_with_nan(tensor: str, whole: Path, tmp_path: Path) -> None:
    """Of a head's row outside the chosen columns, of a token that one prompt has, and of all tokens."""
    manifest, number = read_manifest(whole), 3
    assert tensor != "lm_head.weight" or number not in manifest.columns
    if "embed" in tensor:
        ids = [{*prompt.ids} for prompt in manifest.prompts]
        number = min(ids[1] - ids[0] - ids[2] - {0})
    arrays = load_file(whole / "model.safetensors")
    arrays[tensor][number, 5] = np.nan
    write_tokenizer(write_model(tmp_path / "model", CONFIG, arrays))
    for argv in (["--model_name_or_path", tmp_path / "model"], ["--to_hf", "--model_name_or_path", tmp_path / "flax"]):
        out = tmp_path / ("out" if len(argv) == 3 else "flax")
        outcome = run(convert.main, *argv, "--output_dir", out, "--allow_nonfinite")
        assert outcome.code == 0, outcome.err
    outcome = verify(tmp_path / "out")
    assert outcome.code == 0, outcome.out
    total, rows = sum(len(prompt.ids) for prompt in manifest.prompts), outcome.out
    bad = len(manifest.prompts[1].ids) if "embed" in tensor else total
    assert f"NaN or Inf after {bad} of {total} tokens, the same ones as torch's" in rows
    assert ("chosen columns" in rows, "largest magnitudes" in rows) == (tensor != Q0, "embed" in tensor)
    # The finite logits are compared.
    if tensor != Q0:
        change_json(tmp_path / "out" / MANIFEST, lambda v: v["prompts"][2]["logits"][0].__setitem__(0, 1e3))
        (failed,) = failing(verify(tmp_path / "out"))
        assert failed.startswith("chosen columns") and "worst at prompt 3, token 0" in failed


def test_damages_of_an_adapter(adapted: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(adapted, tmp_path / "copied", ignore=shutil.ignore_patterns("checkpoint-*"))
    other = write_model(tmp_path / "other", CONFIG, make_arrays(CONFIG, seed=1))
    rows = failing(verify(copied, "--model_name_or_path", other))
    assert rows[0].startswith(str(other)) and "its tensors are not those of" in rows[0]
    assert [row.split("  ")[0] for row in rows[1:]] == ["chosen columns", "largest magnitudes", "likeliest tokens"]
    flip_bit(copied, "adapter_model.safetensors", A0)
    (row,) = failing(verify(copied))
    assert row.startswith(A0)
    outcome = verify(copied, "--model_name_or_path", tmp_path / "none")
    assert outcome.code == 2 and "none: no such folder" in outcome.err and outcome.err.count("\n") == 1


def test_bases_of_other_kinds(adapted: Path, whole: Path, tmp_path: Path) -> None:
    """Torch reads HF folders, pickled weights too; one line names any other kind before the first section."""
    from test_strangers import write_gguf

    write_gguf(tmp_path / "m.gguf")
    copied = shutil.copytree(adapted, tmp_path / "copied", ignore=shutil.ignore_patterns("checkpoint-*"))
    for base, kind in ((whole.parent / "flax", "a Flax folder, whose"), (tmp_path / "m.gguf", "a .gguf file")):
        outcome = verify(copied, "--model_name_or_path", base)
        change_json(copied / MANIFEST, lambda v, base=base: v.update(base={"name": str(base), "sha256": None}))
        assert verify(copied).err == outcome.err
        assert outcome.code == 2 and not outcome.out and outcome.err.count("\n") == 1
        assert f"the adapter's base model is {kind}" in outcome.err and "--model_name_or_path HF_DIR" in outcome.err

    base = shutil.copytree(adapted.parent / "model", tmp_path / "base")
    arrays = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save({name: torch.tensor(array) for name, array in arrays.items()}, base / "pytorch_model.bin")
    outcome = verify(adapted, "--model_name_or_path", base)
    assert outcome.code == 2 and "--allow_pickle reads them" in outcome.err
    for flags in (["--allow_pickle"], ["--allow_pickle", "True"]):
        assert_holds(verify(adapted, "--model_name_or_path", base, *flags), 12)


def test_exceptions_without_a_text(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AutoTokenizer", "AutoConfig"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", raising(AssertionError()))
    tokens, logits = failing(verify(whole))
    assert tokens.endswith("cannot read the folder: AssertionError") and logits.endswith(
        "cannot read it: AssertionError"
    )


@pytest.mark.parametrize(
    ("change", "flags", "error"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), [], f"{MANIFEST}: no such file: this folder was not exported"),
        (lambda folder: shutil.rmtree(folder), [], "no such folder; give the folder that a run exported"),
        (lambda folder: (folder / MANIFEST).write_text("{"), [], "not valid JSON at line 1"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), [], "should hold a JSON object"),
        (lambda folder: change_json(folder / MANIFEST, lambda v: v.update(format=2)), [], "is of format 2, and this"),
        (lambda folder: change_json(folder / MANIFEST, lambda v: v.pop("columns")), [], "lacks 'columns'"),
        (lambda folder: change_json(folder / MANIFEST, lambda v: v["prompts"][0]["ids"].pop()), [], "prompt 1 of "),
        (lambda folder: change_json(folder / MANIFEST, lambda v: v["tensors"][Q0].pop("file")), [], "lacks 'file'"),
        (lambda folder: change_json(folder / MANIFEST, lambda v: v.update(format=True)), [], "is of format True"),
        (lambda folder: None, ["--records", "3"], "--records: has no meaning with --verify"),
        (lambda folder: None, ["--allow_pickle"], "--allow_pickle: has no meaning with --verify of a"),
        (lambda folder: None, ["--verify", "x"], "--verify: takes one folder at a time"),
        (lambda folder: None, ["--model_name_or_path", "x"], "--model_name_or_path: has no meaning with --verify of a"),
    ],
)
def test_bad_input(change: Callable[[Path], Any], flags: list[str], error: str, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "copied")
    change(folder)
    outcome = verify(folder, *flags)
    assert outcome.code == 2 and error in outcome.err and outcome.err.count("\n") == 1, outcome.err


def of_prompt(key: str, at: int | None, value: Any) -> Callable[[Any], None]:
    """A change of a value of the second prompt, or of an element."""

    def change(values: Any) -> None:
        prompt = values["prompts"][1]
        prompt[key] = value if at is None else [*prompt[key][:at], value, *prompt[key][at + 1 :]]

    return change


WRONG: list[tuple[Callable[[Any], Any], str]] = [
    (lambda v: v.update(more=1), "the file has 'more', which has no meaning"),
    *((lambda v, base=base: v.update(base=base), "base ") for base in ("x", 5, {}, {"name": "x"}, [])),
    (lambda v: v.update(base={"name": 5, "sha256": None}), "base has no name"),
    *((lambda v, bad=bad: v["columns"].__setitem__(3, bad), "columns should") for bad in (-1, 0.5, "1", True, 2**40)),
    (lambda v: v.update(columns=[]), "columns should be a list of ids from 0 to 2^31 - 1, not empty"),
    (lambda v: v["columns"].reverse(), "columns are not sorted"),
    *((of_prompt("ids", 2, bad), "prompt 2: ids should be") for bad in ("x", 2**40, 10**30, -1, 0.5, None)),
    *((of_prompt("likeliest", 2, bad), "prompt 2: likeliest should be") for bad in (None, -1, 0.5)),
    *((of_prompt("largest", 2, bad), "prompt 2: largest have") for bad in (10**400, "1", True, float("inf"), [])),
    (lambda v: v["prompts"][1]["logits"][0].__setitem__(0, "1"), "prompt 2: logits have '1', no number"),
    (of_prompt("logits", 0, []), "prompt 2: logits should be a list of 64 numbers"),
    (of_prompt("logits", None, {}), "prompt 2 should have logits"),
    (of_prompt("text", None, 5), "prompt 2 has a text that is none"),
    (of_prompt("text", None, None), "prompts have texts in part"),
    (lambda v: v.update(prompts=[]), "prompts should be a list, not empty"),
    (lambda v: v["tensors"][Q0].update(size=3), f"tensor '{Q0}' has 'size', which has no meaning"),
    (lambda v: v["tensors"][Q0].update(shape=[True]), "has a shape without sizes"),
    (lambda v: v["tensors"][Q0].update(sha256=None), "has values that are no text"),
    *((lambda v, f=file: v["tensors"][Q0].update(file=f), "no plain file name") for file in ("", "..", "a/b", "/a")),
    (lambda v: v["files"].update(x=1), "file 'x' has a digest that is no text"),
    (lambda v: v.update(tensors={}), "tensors should not be empty"),
    (lambda v: v.update(files={}), "files should not be empty"),
    (lambda v: v.update(flags=[]), "flags should be an object"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_wrong_values(case: int, whole: Path, tmp_path: Path) -> None:
    change, problem = WRONG[case]
    shutil.copy(whole / MANIFEST, tmp_path)
    change_json(tmp_path / MANIFEST, change)
    with pytest.raises(InputError) as raised:
        read_manifest(tmp_path)
    assert f"{MANIFEST}: is no manifest of this program: " in str(raised.value) and problem in str(raised.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.sampled_from([2**40, -(10**30), 10**400])
    | st.floats() | st.text(max_size=4) | st.sampled_from(["..", "\x1b[2J", "\ud800", "config.json"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=drawn_cases(60))
@given(data=st.data())
def test_any_manifest_has_rows_or_a_line(data: st.DataObject, whole: Path) -> None:
    """Of a value that is replaced, removed or added anywhere: the command ends with rows, or with one line."""
    values = json.loads((whole / MANIFEST).read_text())
    at: Any = values
    for _ in range(data.draw(st.integers(0, 4))):
        children = [child for child in (at.values() if isinstance(at, dict) else at) if isinstance(child, dict | list)]
        at = data.draw(st.sampled_from(children)) if children else at
    keys = st.sampled_from([*at] if isinstance(at, dict) else range(len(at))) if at else st.nothing()
    key = data.draw(keys | st.text(max_size=4) if isinstance(at, dict) else keys)
    if data.draw(st.booleans()) and (isinstance(at, list) or key in at):
        del at[key]
    else:
        at[key] = data.draw(VALUES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in whole.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / MANIFEST).unlink()
        (folder / MANIFEST).write_text(json.dumps(values))
        outcome = verify(folder)
    shown = outcome.out + outcome.err
    assert (outcome.code, outcome.out == "", outcome.err.count("\n")) in {(0, False, 1), (1, False, 1), (2, True, 1)}
    assert all(character.isprintable() for character in shown.replace("\n", "")), repr(shown)
    assert ("parity: " in outcome.out) == (outcome.code != 2)


def test_names_do_not_steer_the_terminal(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "copied")

    def add(values: Any) -> None:
        values["tensors"]["\x1b[2J"] = values["tensors"][Q0]
        values["files"]["a\nb"] = ""

    change_json(folder / MANIFEST, add)
    first, second = failing(verify(folder))
    assert first.startswith(r"'\x1b[2J'") and second.startswith(r"'a\nb'")


def test_no_folder_is_named() -> None:
    outcome = run(parity.main, "--verify=")
    assert outcome.code == 2 and "--verify: takes one folder at a time" in outcome.err


# --- a manifest and its folder ---------------------------------------------------------------------------------------


def test_no_stale_manifest(whole: Path, adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that ends half-way leaves a folder without one, and the next export writes it."""
    folder = shutil.copytree(whole, tmp_path / "out")
    argv = ["--to_hf", "--model_name_or_path", whole.parent / "flax", "--output_dir", folder]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(llama_jax.hf.convert, "write_config", stop)
    assert run(convert.main, *argv).code == 130
    monkeypatch.undo()
    assert (folder / "model.safetensors").exists() and verify(folder).code == 2
    assert run(convert.main, *argv).code == 0 and verify(folder).code == 0

    # A run of an adapter, which goes on from its checkpoint.
    monkeypatch.setattr(llama_jax.hf.peft, "write_config", stop)
    run_argv = ["--model_name_or_path", adapted.parent / "model", "--data_path", adapted.parent / "data.json"]
    run_argv += ["--output_dir", shutil.copytree(adapted, tmp_path / "again"), "--max_steps", 2, "--use_cpu", "True"]
    run_argv += [
        "--per_device_train_batch_size",
        2,
        "--use_peft",
        "True",
        "--lora_r",
        4,
        "--lora_dropout",
        0.1,
        "--learning_rate",
        0.1,
    ]
    run_argv += ["--save_steps", 2, "--export_only", "True"]
    assert run(train.main, *run_argv).code == 130
    monkeypatch.undo()
    assert (tmp_path / "again" / "adapter_model.safetensors").exists() and not (tmp_path / "again" / MANIFEST).exists()
    assert run(train.main, *run_argv).code == 0
    before, after = (read_manifest(folder) for folder in (adapted, tmp_path / "again"))
    assert before.tensors == after.tensors and verify(tmp_path / "again").code == 0


def test_one_kind_over_the_other(whole: Path, adapted: Path, tmp_path: Path) -> None:
    """Of a mixed folder transformers would load an adapter on top of the model, or in its place."""
    out = shutil.copytree(adapted, tmp_path / "adapter", ignore=shutil.ignore_patterns("checkpoint-*"))
    flax, model = whole.parent / "flax", adapted.parent / "model"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for flags in (
        ["--to_hf", "--model_name_or_path", flax],
        ["--model_name_or_path", model, "--merge_adapter", adapted],
        ["--model_name_or_path", model, "--merge_adapter", out],
    ):
        outcome = run(convert.main, *flags, "--output_dir", out)
        assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome.err
        assert (
            "is the folder that is read" if out in flags else "holds an adapter (adapter_config.json)"
        ) in outcome.err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    # A run's model over an adapter, as --overwrite_output_dir asks: it writes by the same function.
    llama_jax.hf.convert.to_hf(Source(flax), out, dtype=None, verify=False, flags={})
    assert not [*out.glob("adapter_*")]
    assert_holds(verify(out), 11)

    copied = shutil.copytree(whole, tmp_path / "whole")
    flags = ["--model_name_or_path", model, "--data_path", adapted.parent / "data.json", "--use_cpu", "True"]
    flags += ["--output_dir", copied, "--use_peft", "True", "--overwrite_output_dir", "True"]
    outcome = run(train.main, *flags)
    assert outcome.code == 2 and "holds an HF model (model.safetensors)" in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.slow
def test_a_run_over_an_adapter(adapted: Path, tmp_path: Path) -> None:
    out = shutil.copytree(adapted, tmp_path / "adapter")
    flags = ["--model_name_or_path", adapted.parent / "model", "--data_path", adapted.parent / "data.json"]
    flags += ["--output_dir", out, "--overwrite_output_dir", "True", "--max_steps", 1, "--use_cpu", "True"]
    flags += ["--per_device_train_batch_size", 2, "--save_strategy", "no"]
    assert run(train.main, *flags).code == 0
    assert_holds(verify(out), 12)  # with special_tokens_map.json, of the pad token that a run adds
    names = [name for name, _ in transformers.AutoModelForCausalLM.from_pretrained(out).named_parameters()]
    assert len(names) == 21 and not any("lora" in name for name in names)


PROBLEMS = {
    "disk": OSError(28, "No space left on device"),
    "input": InputError("x: cannot be read"),
    "memory": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    "bug": jax.errors.JaxRuntimeError("INTERNAL: a bug"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_an_export_without_a_manifest(
    problem: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is complete all the same. A bug is not hidden."""
    argv = ["--to_hf", "--model_name_or_path", whole.parent / "flax", "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(llama_jax.hf.convert, "prompt_logits", raising(PROBLEMS[problem]))
    if problem == "bug":
        with pytest.raises(jax.errors.JaxRuntimeError):
            run(convert.main, *argv)
        return
    outcome = run(convert.main, *argv)
    (line,) = [line for line in outcome.err.splitlines() if "warning" in line]
    assert outcome.code == 0 and "is complete, and only manifest.json is missing: " in line
    assert line.endswith("; repeat the command to write it")
    assert " ".join(str(PROBLEMS[problem]).split()) in line
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {path.name for path in whole.iterdir()} - {MANIFEST}


BASES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "gone": (shutil.rmtree, "was removed", ""),
    "written": (lambda base: write_model(base, CONFIG, make_arrays(CONFIG, seed=1)), "was written", ""),
    "written while it is read": (
        lambda base: write_model(base, CONFIG, make_arrays(CONFIG, seed=1)),
        "was written",
        "prompt_logits",
    ),
}


def test_the_name_of_a_base_has_no_secrets() -> None:
    assert base_of("gs://me:key@bucket/model?token=x", {}) == {"name": "gs://bucket/model?***", "sha256": None}


def test_a_source_knows_its_files(tmp_path: Path, whole: Path) -> None:
    """Of shards, of an equal size; of a Flax folder that is gone."""
    source = Source(write_model(tmp_path / "model", shards=2))
    source.check_unchanged()
    write_model(tmp_path / "model", CONFIG, make_arrays(CONFIG, seed=1), shards=2)
    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors: was written after this run opened it"):
        source.check_unchanged()
    flax = Source(shutil.copytree(whole.parent / "flax", tmp_path / "flax"))
    flax.check_unchanged()
    shutil.rmtree(tmp_path / "flax")
    with pytest.raises(InputError, match="was removed"):
        flax.check_unchanged()


@pytest.mark.slow
@pytest.mark.parametrize("case", BASES)
def test_a_base_that_changes(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digest and logits of a base that the run did not train on would prove what is not so."""
    base = write_tokenizer(write_model(tmp_path / "model"))
    change, problem, late = BASES[case]
    module, name = (llama_jax.run.manifest, late) if late else (llama_jax.hf.peft, "write_adapter")
    after(monkeypatch, module, name, lambda: change(base))
    saves = ["--save_strategy", "no"] if late else ["--save_steps", 2]
    out = trained(tmp_path, *saves)
    line = (out / "run.log").read_text()
    assert f"model.safetensors: {problem} after this run opened it; " in line
    assert ("--export_only True" in line) != bool(late)
    assert not (out / MANIFEST).exists() and (out / "trainer_state.json").exists()
    assert (out / "adapter_model.safetensors").exists() and "done" in line


# --- numbers and meshes ----------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1))
def test_nine_digits_name_a_float32(seed: int) -> None:
    """Of all float32, a number in 66 needs the ninth."""
    array = np.random.default_rng(seed).integers(0, 2**32, 1000, np.uint32).view(np.float32)
    found = json.loads(json.dumps(_numbers(array)))
    finite = np.isfinite(array)
    assert [value is not None for value in found] == finite.tolist()
    back = np.asarray([value for value in found if value is not None], np.float32)
    assert back.tobytes() == array[finite].tobytes()


def on_meshes(specs: list[str], folder: str, scan_layers: bool) -> None:
    """Logits on meshes are those of transformers."""
    source = Source(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    table, prompts, columns = name_table(source.config), [[1, 5, 9, 100, 7], [3] * 20, [2]], choose_columns(259)
    dtypes = dict.fromkeys(table, np.dtype(np.float32))
    for spec in specs:
        size = int(np.prod([int(part.partition("=")[2]) for part in spec.split(",")]))
        mesh = sharding.make_mesh(jax.devices()[:size], spec)
        params = source.load(RunOptions(scan_layers=scan_layers), mesh)
        found = prompt_logits(source.config, None, mesh, prompts, columns, reader(params, source.config, dtypes))
        for prompt, logits in zip(prompts, found, strict=True):
            with torch.no_grad():
                assert_near(logits, model(torch.tensor([prompt])).logits[0].numpy(), columns)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("specs", "kind", "scan_layers"),
    [
        (["data=2,fsdp=2,tensor=2"], "llama", True),
        (["fsdp=8", "tensor=8", "context=4,fsdp=2"], "llama", False),
        (["fsdp=2,context=2,tensor=2"], "mistral, window", True),
        (["data=2,fsdp=2"], "smollm3", True),
        (["data=2,fsdp=2"], "granite", False),
    ],
)
def test_meshes(specs: list[str], kind: str, scan_layers: bool, tmp_path: Path) -> None:
    config = {**CONFIG, **SISTERS.get(kind, {})}
    write_model(tmp_path / "model", config)
    on_devices(8, f"test_manifest.on_meshes({specs}, {str(tmp_path / 'model')!r}, {scan_layers})")
