"""The commands: bad input is one line, exit code 2, nothing compiled or written; good input does what it says."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tiny import (
    ALPACA,
    CONFIG,
    ROOT,
    environment,
    hf_shapes,
    log_entries,
    make_arrays,
    make_records,
    run,
    slow_unless,
    write_json,
    write_model,
    write_tokenizer,
)

sys.path.insert(0, str(ROOT / "benchmarks"))
import first_hour
import tpu_compiler

import convert_torch_to_flax
import llama_jax.command.evaluate
import llama_jax.command.generate
import llama_jax.run.loaded
import train_jax
from llama_jax.base.errors import run_command
from llama_jax.command import convert, parity, report
from llama_jax.data.examples import alpaca_prompt
from llama_jax.data.tokenizer import open_tokenizer
from llama_jax.setup.arguments import Arguments, parse_arguments

INDEX = "model.safetensors.index.json"
KEY = "model.layers.1.mlp.down_proj.weight"


class Case:
    """A run that works, in a folder of its own, until something in it is spoilt."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = write_tokenizer(write_model(folder / "model"))
        self.alpaca = write_json(folder / "alpaca.json", ALPACA)
        self.tokenized = write_json(folder / "tokenized.json", make_records(12))
        self.output = folder / "out"
        self.flags: dict[str, Any] = {
            "model_name_or_path": self.model,
            "data_path": self.alpaca,
            "output_dir": self.output,
            "use_cpu": True,
            "max_steps": 2,
            "save_strategy": "no",
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 1,
            "logging_steps": 1,
        }

    def argv(self) -> list[str]:
        return [part for key, value in self.flags.items() for part in (f"--{key}", str(value))]

    def config(self, **changes: Any) -> None:
        write_json(self.model / "config.json", {**CONFIG, **changes})

    def tensors(self, change: Callable[[dict[str, np.ndarray]], Any], **options: Any) -> None:
        arrays = make_arrays(CONFIG)
        change(arrays)
        (self.model / "model.safetensors").unlink()
        write_model(self.model, CONFIG, arrays, **options)

    def records(self, value: Any) -> None:
        self.alpaca.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")

    def index(self, change: Callable[[dict[str, str]], Any]) -> None:
        self.tensors(lambda arrays: None, shards=3)
        index = json.loads((self.model / INDEX).read_text())
        change(index["weight_map"])
        write_json(self.model / INDEX, index)

    def yaml(self, text: str) -> None:
        (self.folder / "run.yaml").write_text(text)
        self.flags["config"] = self.folder / "run.yaml"


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def error_line(err: str) -> str:
    """The one line of a refused command; notes and warnings may stand before it."""
    lines = err.strip().splitlines()
    assert lines and lines[-1].startswith("error: "), err
    assert not any(line.startswith("error") for line in lines[:-1]), err
    assert "Traceback" not in err and "usage:" not in err
    assert len(lines[-1]) < 600, "a line for a person to read"
    return lines[-1]


def check_refused(case: Case, named: list[str], argv: list[str] | None = None, compiles: bool = False) -> None:
    before = sorted(case.output.rglob("*")) if case.output.is_dir() else []
    outcome = run(train_jax.main, *(case.argv() if argv is None else argv))
    assert outcome.code == 2, outcome.err
    line = error_line(outcome.err)
    for part in named:
        assert part in line, line
    assert compiles or not outcome.compiled, "compiled before the input was known to be good"
    assert (sorted(case.output.rglob("*")) if case.output.is_dir() else []) == before


def truncate(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def masked(records: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    return [{**r, "labels": [-100] * len(r["labels"])} for r in records]


def only_bin(case: Case) -> None:
    (case.model / "model.safetensors").rename(case.model / "pytorch_model.bin")


def replaced(record: int, **changes: Any) -> Callable[[Case], None]:
    """One record (from 1) with other values; None takes a key away."""

    def spoil(case: Case) -> None:
        records = [dict(r) for r in ALPACA]
        records[record - 1] |= changes
        case.records([{k: v for k, v in r.items() if v is not None} for r in records])

    return spoil


BAD: dict[str, tuple[Callable[[Case], Any], list[str]]] = {
    # The model's folder.
    "no folder": (lambda c: c.flags.update(model_name_or_path=c.folder / "nowhere"), ["nowhere", "no such folder"]),
    "a name of the hub": (lambda c: c.flags.update(model_name_or_path="org/model"), ["org/model", "hf download"]),
    "empty folder": (lambda c: c.flags.update(model_name_or_path=c.folder), ["no config.json"]),
    "a file of the folder": (
        lambda c: c.flags.update(model_name_or_path=c.model / "model.safetensors"),
        ["is one file of an HF model", "give the folder: --model_name_or_path"],
    ),
    "no weights": (lambda c: (c.model / "model.safetensors").unlink(), ["model.safetensors"]),
    "truncated safetensors": (lambda c: truncate(c.model / "model.safetensors", 0.7), ["model/model.safetensors"]),
    "empty safetensors": (lambda c: truncate(c.model / "model.safetensors", 0), ["model/model.safetensors"]),
    "missing shard": (
        lambda c: (c.index(lambda m: m), (c.model / "model-00002-of-00003.safetensors").unlink()),
        [INDEX, "model-00002-of-00003.safetensors"],
    ),
    "shard of the index is nowhere": (lambda c: c.index(lambda m: m.update({KEY: "gone.safetensors"})), ["gone.safe"]),
    "shard outside": (lambda c: c.index(lambda m: m.update({KEY: "../x"})), [INDEX, "'../x'"]),
    "index cut": (lambda c: (c.index(lambda m: m), truncate(c.model / INDEX, 0.5)), [INDEX, "line 1", "column"]),
    "wrong shape": (lambda c: c.tensors(lambda a: a.update({KEY: a[KEY].T})), [KEY, "[48, 32]", "[32, 48]"]),
    "missing tensor": (lambda c: c.tensors(lambda a: a.pop(KEY)), ["1 missing", KEY]),
    "unknown tensor": (
        lambda c: c.tensors(lambda a: a.update({"model.layers.2.mlp.down_proj.weight": a[KEY]})),
        ["1 unknown", "model.layers.2.mlp.down_proj.weight"],
    ),
    "integer tensor": (lambda c: c.tensors(lambda a: a.update({KEY: a[KEY].astype(np.int8)})), [KEY, "quantized"]),
    "bin": (only_bin, ["pickled", "--allow_pickle"]),
    "config.json cut": (lambda c: truncate(c.model / "config.json", 0.5), ["config.json", "line 1", "column"]),
    "config.json is a list": (lambda c: write_json(c.model / "config.json", [CONFIG]), ["config.json", "object"]),
    "another model_type": (lambda c: c.config(model_type="gemma2"), ["config.json", "model_type", "'gemma2'"]),
    "unknown config key": (lambda c: c.config(sliding_window=128), ["config.json", "'sliding_window'"]),
    "unsupported config value": (
        lambda c: c.config(attention_dropout=0.1),
        ["config.json", "attention_dropout", "0.1"],
    ),
    "unknown activation": (lambda c: c.config(hidden_act="swish7"), ["config.json", "hidden_act", "'swish7'"]),
    "wrong type in config": (lambda c: c.config(hidden_size="32"), ["config.json", "hidden_size", "'32'"]),
    "missing config key": (lambda c: c.config(vocab_size=None), ["config.json", "'vocab_size'"]),
    "unknown rope": (lambda c: c.config(rope_scaling={"type": "su"}), ["config.json", "'su'"]),
    "config.json of a smaller model": (lambda c: c.config(num_hidden_layers=1), ["unknown", "model.layers.1."]),
    # The tokenizer.
    "no tokenizer": (lambda c: (c.model / "tokenizer.json").unlink(), ["tokenizer.json", "tokenizer.model"]),
    "damaged tokenizer": (lambda c: truncate(c.model / "tokenizer.json", 0.5), ["tokenizer.json"]),
    # The data.
    "no data": (lambda c: c.flags.update(data_path=c.folder / "nowhere.json"), ["nowhere.json", "no such"]),
    "data is a folder": (
        lambda c: c.flags.update(data_path=c.folder / "model"),
        ["model/tokenizer.json", "holds one object of several lines"],
    ),
    "empty data": (lambda c: c.records(""), ["alpaca.json", "empty"]),
    "blank data": (lambda c: c.records(" \n\n"), ["alpaca.json", "empty"]),
    "no records": (lambda c: c.records("[]"), ["alpaca.json", "no records"]),
    "data cut": (lambda c: truncate(c.alpaca, 0.5), ["alpaca.json", "line 1", "column"]),
    "data lines cut": (
        lambda c: c.records("\n".join(map(json.dumps, ALPACA))[:-9]),
        ["alpaca.json", "line 5", "column"],
    ),
    "data is not UTF-8": (lambda c: c.alpaca.write_bytes(b'[{"instruction": "\xff"}]'), ["alpaca.json"]),
    "record is a string": (lambda c: c.records([*ALPACA, "x"]), ["alpaca.json", "record 6", "a string"]),
    "no instruction": (replaced(3, instruction=None), ["alpaca.json", "record 3", "'instruction'"]),
    "no output": (replaced(1, output=None), ["alpaca.json", "record 1", "'output'"]),
    "output is a number": (replaced(5, output=42), ["alpaca.json", "record 5", "'output'", "a number", "a string"]),
    "output is null": (lambda c: c.records([{**ALPACA[0], "output": None}]), ["record 1", "'output'", "null"]),
    "input is a list": (replaced(2, input=["x"]), ["alpaca.json", "record 2", "'input'", "a list"]),
    "half a surrogate pair": (replaced(4, output="\ud83d"), ["alpaca.json", "record 4"]),
    "labels are short": (
        lambda c: c.records([*make_records(2), {"input_ids": [1, 2], "labels": [1]}]),
        ["alpaca.json", "record 3", "2 input_ids", "1 labels"],
    ),
    "token outside the vocabulary": (
        lambda c: c.records([*make_records(2), {"input_ids": [1, 259], "labels": [-100, 2]}]),
        ["alpaca.json", "record 3", "259"],
    ),
    "label outside the vocabulary": (
        lambda c: c.records([{"input_ids": [1, 2], "labels": [-100, -1]}]),
        ["alpaca.json", "record 1", "label", "-1"],
    ),
    "token beyond 64 bits": (
        lambda c: c.records([{"input_ids": [1, 2**64], "labels": [-100, 2]}]),
        ["alpaca.json", "record 1"],
    ),
    "all masked": (lambda c: c.records(masked(make_records(3))), ["alpaca.json", "masked"]),
    "all cut": (lambda c: c.flags.update(model_max_length=20), ["alpaca.json", "masked", "model_max_length"]),
    "too few to fill a batch": (
        lambda c: c.flags.update(dataloader_drop_last=True, per_device_train_batch_size=6),
        ["--dataloader_drop_last", "5 examples"],
    ),
    # The output.
    "output below a file": (lambda c: c.flags.update(output_dir=c.alpaca / "out"), ["output_dir", "alpaca.json/out"]),
    "output is a file": (lambda c: c.flags.update(output_dir=c.alpaca), ["output_dir", "alpaca.json"]),
    "resume from nothing": (
        lambda c: c.flags.update(resume_from_checkpoint=True),
        ["--resume_from_checkpoint", "/out"],
    ),
    "resume from elsewhere": (
        lambda c: c.flags.update(resume_from_checkpoint=c.folder / "checkpoint-2"),
        ["--resume_from_checkpoint", "checkpoint-2"],
    ),
    # The flags.
    "no model": (lambda c: c.flags.pop("model_name_or_path"), ["--model_name_or_path"]),
    "no data flag": (lambda c: c.flags.pop("data_path"), ["--data_path"]),
    "data twice": (lambda c: c.flags.update({"data-path": c.alpaca}), ["--data_path is given twice", "spaces"]),
    "unknown flag": (lambda c: c.flags.update(learning_rates=1), ["--learning_rates", "did you mean --learning_rate?"]),
    "another unknown flag": (lambda c: c.flags.update(deepspeed_stage=1), ["--deepspeed_stage"]),
    "a word too many": (lambda c: c.flags.update(learning_rate="1e-3 x"), ["1e-3 x"]),
    "not a number": (lambda c: c.flags.update(learning_rate="fast"), ["--learning_rate", "'fast'"]),
    "not a whole number": (lambda c: c.flags.update(max_steps=1.5), ["--max_steps", "'1.5'"]),
    "not a boolean": (lambda c: c.flags.update(bf16="perhaps"), ["--bf16", "perhaps"]),
    "not a choice": (lambda c: c.flags.update(save_strategy="always"), ["--save_strategy", "'always'", "epoch"]),
    "not a version": (lambda c: c.flags.update(hf_compat="4.28"), ["--hf_compat", "'4.28'", "4.37"]),
    "not a schedule": (lambda c: c.flags.update(lr_scheduler_type="cosines"), ["lr_scheduler_type", "'cosines'"]),
    "not an optimizer": (lambda c: c.flags.update(optim="adamw_torhc"), ["--optim", "adamw_torhc", "use adamw_torch"]),
    "not a type": (lambda c: c.flags.update(dtype="float8"), ["--dtype", "float8", "bfloat16"]),
    "a bucket": (
        lambda c: c.flags.update(output_dir="s3://bucket/output"),
        ["--output_dir s3://bucket/output: is not reached from here", "gs://"],
    ),
    "best in 4.37": (
        lambda c: c.flags.update(save_strategy="best", eval_strategy="steps", validation_split_percentage=50),
        ["--save_strategy best", "--hf_compat 5"],
    ),
    "save_steps 0": (lambda c: c.flags.update(save_strategy="steps", save_steps=0), ["--save_steps 0", "above 0"]),
    "save_steps 1.5": (lambda c: c.flags.update(save_strategy="steps", save_steps=1.5), ["--save_steps 1.5", "whole"]),
    "logging_steps 0": (lambda c: c.flags.update(logging_steps=0), ["--logging_steps 0", "above 0"]),
    "batch 0": (lambda c: c.flags.update(per_device_train_batch_size=0), ["--per_device_train_batch_size 0"]),
    "accumulation 0": (lambda c: c.flags.update(gradient_accumulation_steps=0), ["--gradient_accumulation_steps 0"]),
    "length 0": (lambda c: c.flags.update(model_max_length=0), ["--model_max_length 0"]),
    "no epochs": (lambda c: c.flags.update(num_train_epochs=0, max_steps=-1), ["--num_train_epochs 0"]),
    "epochs without end": (
        lambda c: c.flags.update(num_train_epochs=1e18, max_steps=-1),
        ["updates are above 100,000,000", "lower --num_train_epochs"],
    ),
    "steps without end": (
        lambda c: c.flags.update(max_steps=10**8 + 1),
        ["100,000,001 updates are above 100,000,000", "or --max_steps"],
    ),
    "epochs nan": (lambda c: c.flags.update(num_train_epochs="nan", max_steps=-1), ["--num_train_epochs"]),
    "epochs inf": (lambda c: c.flags.update(num_train_epochs="inf", max_steps=-1), ["--num_train_epochs"]),
    "warmup_ratio 3": (lambda c: c.flags.update(warmup_ratio=3), ["--warmup_ratio 3", "between 0 and 1"]),
    "warmup_steps -5": (lambda c: c.flags.update(warmup_steps=-5), ["--warmup_steps -5"]),
    "warmup_steps nan": (lambda c: c.flags.update(warmup_steps="nan"), ["--warmup_steps"]),
    "learning_rate -1": (lambda c: c.flags.update(learning_rate=-1), ["--learning_rate"]),
    "learning_rate nan": (lambda c: c.flags.update(learning_rate="nan"), ["--learning_rate"]),
    "adam_beta1 1": (lambda c: c.flags.update(adam_beta1=1), ["--adam_beta1"]),
    "adam_beta2 1.5": (lambda c: c.flags.update(adam_beta2=1.5), ["--adam_beta2"]),
    "adam_epsilon -1": (lambda c: c.flags.update(adam_epsilon=-1), ["--adam_epsilon"]),
    "weight_decay -1": (lambda c: c.flags.update(weight_decay=-1), ["--weight_decay"]),
    "label smoothing 1": (lambda c: c.flags.update(label_smoothing_factor=1), ["--label_smoothing_factor"]),
    "config file missing": (lambda c: c.flags.update(config=c.folder / "no.yaml"), ["--config", "no.yaml", "no such"]),
    "config file is a folder": (lambda c: c.flags.update(config=c.folder), ["--config", "is a folder"]),
    "config file is not text": (lambda c: c.flags.update(config=c.model / "model.safetensors"), ["--config"]),
    "config file is a list": (lambda c: c.yaml("- bf16\n"), ["run.yaml", "map flags to values"]),
    "config file is empty": (lambda c: c.yaml(""), ["run.yaml", "map flags to values"]),
    "config file is broken": (lambda c: c.yaml("bf16: [true\nseed: 1\n"), ["run.yaml", "YAML", "line"]),
    "config file with an unknown key": (
        lambda c: c.yaml("learning_rat: 1\n"),
        ["run.yaml", "'learning_rat'", "did you mean learning_rate?"],
    ),
    "config file with a wrong value": (lambda c: c.yaml("learning_rate: fast\n"), ["--learning_rate", "'fast'"]),
}


@pytest.mark.parametrize(("spoil", "named"), BAD.values(), ids=BAD.keys())
def test_bad_input(spoil: Callable[[Case], Any], named: list[str], case: Case) -> None:
    spoil(case)
    check_refused(case, named)


def test_flag_without_its_value(case: Case) -> None:
    check_refused(case, ["--learning_rate"], [*case.argv(), "--learning_rate"])
    check_refused(case, ["--config"], [*case.argv(), "--config"])


def test_no_flags_at_all(case: Case) -> None:
    check_refused(case, ["--model_name_or_path"], [])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A run with checkpoints in its output folder."""
    case = Case(tmp_path_factory.mktemp("trained"))
    case.flags |= {"save_strategy": "steps", "save_steps": 1}
    outcome = run(train_jax.main, *case.argv())
    assert outcome.code == 0, outcome.err
    return case


@pytest.fixture
def fresh(trained: Case) -> Iterator[Case]:
    """The same with its flags to be changed."""
    flags = dict(trained.flags)
    yield trained
    trained.flags = flags


def test_checkpoints_are_not_trained_over(fresh: Case) -> None:
    check_refused(fresh, ["/out", "checkpoint-2", "--resume_from_checkpoint True", "--overwrite_output_dir True"])


def test_resume_from_a_step_that_is_not_there(fresh: Case) -> None:
    fresh.flags["resume_from_checkpoint"] = fresh.output / "checkpoint-7"
    check_refused(fresh, ["--resume_from_checkpoint", "checkpoint-7", "is not there", "has checkpoint-1, checkpoint-2"])


def test_resume_another_model(fresh: Case) -> None:
    other = write_tokenizer(write_model(fresh.folder / "other", {**CONFIG, "intermediate_size": 64}))
    fresh.flags |= {"resume_from_checkpoint": True, "model_name_or_path": other, "max_steps": 4}
    check_refused(fresh, ["checkpoint-2", "holds another model: it has intermediate_size 48, this one 64"])


def test_resume_a_run_that_was_longer(fresh: Case) -> None:
    fresh.flags |= {"resume_from_checkpoint": True, "max_steps": 1}
    check_refused(fresh, ["checkpoint-2", "1"])


@pytest.mark.parametrize("bad", ["data", "model", "schedule"])
def test_bad_input_costs_no_checkpoint(bad: str, fresh: Case) -> None:
    """`--overwrite_output_dir` removes the old run when the new one can begin, not before."""
    fresh.flags |= {
        "data": {"data_path": fresh.folder / "nowhere.json"},
        "model": {"model_name_or_path": fresh.folder / "nowhere"},
        "schedule": {"lr_scheduler_type": "nowhere"},
    }[bad]
    fresh.flags["overwrite_output_dir"] = True
    saved = fresh.folder / "saved"
    if not saved.exists():  # the tests after this one get the checkpoints back
        subprocess.run(["cp", "-a", str(fresh.output), str(saved)], check=True)
    try:
        check_refused(fresh, ["nowhere"])
    finally:
        subprocess.run(["rm", "-rf", str(fresh.output)], check=True)
        subprocess.run(["cp", "-a", str(saved), str(fresh.output)], check=True)


def test_truncated_pickle_and_bin_on_request(case: Case) -> None:
    torch = pytest.importorskip("torch")
    (case.model / "model.safetensors").unlink()
    path = case.model / "pytorch_model.bin"
    torch.save({name: torch.from_numpy(a) for name, a in make_arrays(CONFIG).items()}, path)
    case.flags["allow_pickle"] = True
    outcome = run(train_jax.main, *case.argv())
    assert outcome.code == 0, outcome.err
    case.flags["output_dir"] = case.output = case.folder / "out2"
    generating = ("--model_name_or_path", case.model, "--instruction", "Hi", "--use_cpu", "--max_new_tokens", 1)
    assert "--allow_pickle" in error_line(run(llama_jax.command.generate.main, *generating).err)
    assert run(llama_jax.command.generate.main, *generating, "--allow_pickle").code == 0
    truncate(path, 0.9)
    check_refused(case, ["pytorch_model.bin"])


REAL = ["truncated safetensors", "data cut", "unknown flag", "output below a file", "config file is broken"]


@pytest.mark.parametrize("name", [slow_unless(name == "truncated safetensors", name) for name in REAL])
def test_bad_input_in_a_real_process(name: str, case: Case) -> None:
    spoil, named = BAD[name]
    spoil(case)
    command = [sys.executable, str(ROOT / "train_jax.py"), *case.argv()]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(torch=False), cwd=case.folder)
    assert result.returncode == 2 and not result.stdout
    line = error_line(result.stderr)
    for part in named:
        assert part in line
    assert not case.output.exists() or not any(case.output.iterdir())


CONVERT_BAD: dict[str, tuple[Callable[[Case], list[str]], list[str]]] = {
    "no folder": (lambda c: ["--model_name_or_path", str(c.folder / "nowhere")], ["nowhere", "no such folder"]),
    "not a Flax folder": (lambda c: ["--model_name_or_path", str(c.model), "--to_hf"], ["model", "--to_hf"]),
    "truncated": (
        lambda c: (truncate(c.model / "model.safetensors", 0.5), ["--model_name_or_path", str(c.model)])[1],
        ["model.safetensors"],
    ),
    "bin": (lambda c: (only_bin(c), ["--model_name_or_path", str(c.model)])[1], ["--allow_pickle"]),
    "unknown flag": (lambda c: ["--model_name_or_path", str(c.model), "--verifi"], ["--verifi"]),
    "unknown type": (lambda c: ["--model_name_or_path", str(c.model), "--dtype", "int8"], ["'int8'", "bfloat16"]),
    "wide type": (lambda c: ["--model_name_or_path", str(c.model), "--dtype", "float64"], ["'float64'", "bfloat16"]),
    "no model": (lambda c: [], ["--model_name_or_path"]),
}


@pytest.mark.parametrize(("make", "named"), CONVERT_BAD.values(), ids=CONVERT_BAD.keys())
def test_converter_refuses(make: Callable[[Case], list[str]], named: list[str], case: Case) -> None:
    outcome = run(convert_torch_to_flax.main, *make(case), "--output_dir", case.output)
    assert outcome.code == 2, outcome.err
    line = error_line(outcome.err)
    assert all(part in line for part in named), line
    assert not outcome.compiled and not case.output.exists()


def test_converter_refuses_to_write_where_it_reads(case: Case) -> None:
    outcome = run(convert_torch_to_flax.main, "--model_name_or_path", case.model, "--output_dir", case.model)
    assert outcome.code == 2 and str(case.model) in error_line(outcome.err)
    assert (case.model / "model.safetensors").exists() and not (case.model / "params").exists()


def test_hf_and_flax_are_not_written_into_each_other(case: Case) -> None:
    """A reader would take the old model for the new one. The same kind over the same kind is fine."""
    flax, other = case.folder / "flax", write_model(case.folder / "other", arrays=make_arrays(CONFIG, 9))
    to_flax = ("--model_name_or_path", case.model, "--output_dir")
    to_hf = ("--to_hf", "--model_name_or_path", flax, "--output_dir")
    for _ in range(2):
        assert run(convert_torch_to_flax.main, *to_flax, flax).code == 0
        assert run(convert_torch_to_flax.main, *to_hf, case.folder / "hf").code == 0
    sharded = write_model(case.folder / "sharded", shards=2)
    for argv, folder, name in (
        ((*to_flax, other), other, "model.safetensors"),
        ((*to_flax, sharded), sharded, "model-00001-of-00002.safetensors"),
        ((*to_hf, case.folder / "flax2"), case.folder / "flax2", "llama_jax.json"),
    ):
        shutil.copytree(flax, case.folder / "flax2", dirs_exist_ok=True)
        was = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        outcome = run(convert_torch_to_flax.main, *argv)
        line = error_line(outcome.err)
        assert outcome.code == 2 and name in line and "choose another --output_dir, or remove it" in line
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == was
    case.output = case.flags["output_dir"] = flax
    check_refused(case, ["llama_jax.json", "choose another --output_dir, or remove it"])
    case.flags["model_name_or_path"] = flax
    check_refused(case, ["llama_jax.json"])


def test_only_the_disk_and_the_user_end_without_a_traceback(capsys: pytest.CaptureFixture) -> None:
    def fail(error: BaseException) -> int:
        def main(argv: list[str]) -> int:
            raise error

        return run_command(main)

    assert fail(KeyboardInterrupt()) == 130 and capsys.readouterr().err == "interrupted\n"
    assert fail(OSError(28, "No space left on device", "/x/y")) == 1
    assert capsys.readouterr().err == "error: writing failed: No space left on device: /x/y\n"
    bugs = [OSError(2, "No such file", "/x"), ValueError("os error 28"), SafetensorError("I/O error (os error 2)")]
    for bug in bugs:
        with pytest.raises(type(bug)):
            fail(bug)


@pytest.mark.parametrize("command", ["to_flax", *(slow_unless(False, name) for name in ("to_hf", "train"))])
def test_a_disk_that_takes_no_more(command: str, case: Case) -> None:
    """A file may grow to 32 KiB, as if the disk were full: one line, exit code 1, and no half of a model left."""
    flax, output, data = case.folder / "flax", case.output, case.tokenized
    assert run(convert_torch_to_flax.main, "--model_name_or_path", case.model, "--output_dir", flax).code == 0
    converting = [sys.executable, ROOT / "convert_torch_to_flax.py", "--output_dir"]
    case.flags["data_path"] = data
    training = [sys.executable, ROOT / "train_jax.py", *case.argv(), "--save_strategy", "steps"]
    argv = {
        "to_flax": [*converting, flax, "--model_name_or_path", case.model],
        "to_hf": [*converting, output, "--model_name_or_path", flax, "--to_hf"],
        "train": [*training, "--save_steps", 1, "--disable_tqdm", True],
    }[command]
    limited = f"ulimit -f 32; exec {shlex.join(map(str, argv))}"
    env = {**environment(torch=False), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    result = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, env=env)
    assert result.returncode == 1, result.stderr
    assert re.fullmatch("error: writing failed: File too large.*", error_line(result.stderr))
    assert not list(flax.glob("params.*")) and not list(output.glob("*.safetensors*"))
    if command == "to_flax":
        assert not (flax / "llama_jax.json").exists()
        assert run(convert_torch_to_flax.main, "--model_name_or_path", case.model, "--output_dir", flax).code == 0
        assert (
            run(convert_torch_to_flax.main, "--to_hf", "--model_name_or_path", flax, "--output_dir", output).code == 0
        )


def test_a_prompt_past_the_models_positions(case: Case) -> None:
    """Said where the prompt and the new tokens together are more than the model was made for."""
    (prompt,) = open_tokenizer(case.model).encode_batch([alpaca_prompt({"instruction": "Name a fish"})])
    config = json.loads((case.model / "config.json").read_text())
    generating = ("--model_name_or_path", case.model, "--use_cpu", "--max_new_tokens", 3)
    for positions in (len(prompt) + 3, len(prompt) + 2):
        write_json(case.model / "config.json", {**config, "max_position_embeddings": positions})
        outcome = run(llama_jax.command.generate.main, *generating, "--instruction", "Name a fish")
        assert outcome.code == 0, outcome.err
        said = f"warning: the prompt's {len(prompt)} tokens and --max_new_tokens 3 pass the {positions} positions of"
        assert (said in outcome.err) == (positions < len(prompt) + 3)


def test_message_by_the_chat_template(case: Case) -> None:
    """A template that writes Alpaca's words around the message: the answer to it as an instruction."""
    before, after = alpaca_prompt({"instruction": "MESSAGE"}).split("MESSAGE")
    config = json.loads((case.model / "tokenizer_config.json").read_text())
    written = f"{{{{ bos_token + {before!r} + messages[0].content + {after!r} }}}}"
    generating = ("--model_name_or_path", case.model, "--use_cpu", "--max_new_tokens", 12, "--temperature", 3)
    asked = run(llama_jax.command.generate.main, *generating, "--instruction", "Name a fish")
    without = run(llama_jax.command.generate.main, *generating, "--message", "Name a fish")
    assert without.code == 2 and "no chat template" in error_line(without.err)
    answers = []
    for template in (written, "{{ bos_token }}{{ messages[0].content }}"):
        write_json(case.model / "tokenizer_config.json", config | {"chat_template": template})
        outcome = run(llama_jax.command.generate.main, *generating, "--message", "Name a fish")
        assert outcome.code == 0, outcome.err
        answers.append(outcome.out)
    assert answers[0] == asked.out != answers[1]
    nothing = run(
        llama_jax.command.generate.main, *generating, "--message", ""
    )  # by a template that adds the beginning alone
    assert nothing.code == 0, nothing.err
    write_json(case.model / "tokenizer_config.json", config | {"chat_template": "{{ messages[0].content }}"})
    nothing = run(llama_jax.command.generate.main, *generating, "--message", "")
    assert nothing.code == 2 and "--message: the chat template makes no token" in error_line(nothing.err)
    both = run(llama_jax.command.generate.main, *generating, "--message", "Hi", "--input", "x")
    assert both.code == 2 and "--input belongs to --instruction" in error_line(both.err)


GENERATE_BAD: dict[str, tuple[Callable[[Case], list[str]], list[str]]] = {
    "no folder": (lambda c: ["--model_name_or_path", str(c.folder / "nowhere")], ["nowhere", "no such folder"]),
    "no tokenizer": (
        lambda c: ((c.model / "tokenizer.json").unlink(), ["--model_name_or_path", str(c.model)])[1],
        ["tokenizer.json"],
    ),
    "unknown flag": (lambda c: ["--model_name_or_path", str(c.model), "--top_q", "1"], ["--top_q"]),
    "not a number": (lambda c: ["--model_name_or_path", str(c.model), "--max_new_tokens", "few"], ["'few'"]),
    "no temperature": (lambda c: ["--model_name_or_path", str(c.model), "--temperature", "nan"], ["--temperature"]),
    "a list of settings": (
        lambda c: (write_json(c.model / "generation_config.json", []), ["--model_name_or_path", str(c.model)])[1],
        ["generation_config.json", "object"],
    ),
    "an end that is a word": (
        lambda c: (
            write_json(c.model / "generation_config.json", {"eos_token_id": [257, "</s>"]}),
            ["--model_name_or_path", str(c.model)],
        )[1],
        ["generation_config.json", "eos_token_id", "</s>"],
    ),
    "an end that is a word in config.json": (
        lambda c: (c.config(eos_token_id="</s>"), ["--model_name_or_path", str(c.model)])[1],
        ["/config.json", "eos_token_id", "</s>"],
    ),
    "no tokens": (lambda c: ["--model_name_or_path", str(c.model), "--max_new_tokens", "-1"], ["--max_new_tokens"]),
}


@pytest.mark.parametrize(("make", "named"), GENERATE_BAD.values(), ids=GENERATE_BAD.keys())
def test_generate_refuses(make: Callable[[Case], list[str]], named: list[str], case: Case) -> None:
    outcome = run(llama_jax.command.generate.main, *make(case), "--instruction", "Hi", "--use_cpu")
    assert outcome.code == 2, outcome.err
    line = error_line(outcome.err)
    assert all(part in line for part in named), line
    assert not outcome.out


def test_help() -> None:
    """Every flag with its meaning, exit code 0."""
    for main, flags in (
        (train_jax.main, [f"--{name}" for name in Arguments.__dataclass_fields__]),
        (convert_torch_to_flax.main, ["--to_hf", "--verify"]),
        (llama_jax.command.generate.main, ["--instruction", "--temperature"]),
    ):
        outcome = run(main, "--help", "all")
        assert outcome.code == 0 and not outcome.err
        assert all(flag in outcome.out for flag in flags)


# -- What works ----------------------------------------------------------------------------------------------------


def seed_command(shared: Path) -> list[str]:
    """The words of the seed's command after the script's name."""
    (text,) = (shared / "seed").glob("*.txt")
    match = re.search(r"```bash\n(python finetune_alpaca\.py.*?)```", text.read_text(), re.DOTALL)
    assert match
    words = shlex.split(match[1].replace("\\\n", " "))
    assert words[:2] == ["python", "finetune_alpaca.py"]
    return words[2:]


@pytest.fixture(scope="module")
def seed_run(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """The seed's command as written, on a tiny model of LLaMA's vocabulary, in a process and folder of its own."""
    folder = tmp_path_factory.mktemp("seed") / "a" / "b" / "c"
    folder.mkdir(parents=True)
    words = seed_command(shared)
    model = folder / words[words.index("--model_name_or_path") + 1]
    data = folder / words[words.index("--data_path") + 1]
    small = {**CONFIG, "vocab_size": 32000, "hidden_size": 16, "bos_token_id": 1, "eos_token_id": 2}
    write_model(model.resolve(), small)
    for path in (shared / "data" / "llama-tokenizer").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    data.parent.mkdir()
    rows = json.loads((shared / "data" / "alpaca" / "alpaca_data.json").read_text())[:19]
    write_json(data, rows)
    command = [sys.executable, str(ROOT / "train_jax.py"), *words]
    return folder, subprocess.run(command, capture_output=True, text=True, env=environment(torch=False), cwd=folder)


def test_the_seeds_command(seed_run: tuple[Path, subprocess.CompletedProcess]) -> None:
    folder, result = seed_run
    assert result.returncode == 0, result.stderr
    for flag in ("--loggingdir", "--tf32"):
        assert len([line for line in result.stderr.splitlines() if line.startswith(flag)]) == 1, result.stderr
    out = folder / "output"
    files = {path.name for path in out.iterdir()}
    assert {
        "config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
        "trainer_state.json",
    } <= files
    assert not any(name.startswith("checkpoint-") or name.endswith(".tmp") for name in files), files
    assert not (folder / "log").exists()
    # 19 examples in micro-batches of 1, 8 to an update: two updates in 4.37, whose warm-up is ceil(0.03 * 2) = 1.
    entries = log_entries(out)
    assert [e["step"] for e in entries] == [1, 2]
    assert [e["learning_rate"] for e in entries] == [2e-5, 0.0]
    # 32000 tokens and [PAD].
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 32001
    assert load_file(out / "model.safetensors")["lm_head.weight"].shape == (32001, 16)
    printed = [line for line in result.stdout.splitlines() if line.startswith("{'loss'")]
    assert len(printed) == 2
    outcome = run(parity.main, "--verify", out)  # LLaMA's own tokenizer.model, which transformers reads
    assert outcome.code == 0 and "ids of 'The sea is deep, and'" in outcome.out, outcome.out + outcome.err


def test_the_seeds_folder_loads_in_transformers(seed_run: tuple[Path, subprocess.CompletedProcess]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = seed_run[0] / "output"
    _, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (len(tokenizer), tokenizer.pad_token, tokenizer.pad_token_id) == (32001, "[PAD]", 32000)


def results(folder: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    weights = {name: a.tobytes() for name, a in load_file(folder / "model.safetensors").items()}
    return weights, log_entries(folder)


def test_config_file_equals_the_flags(case: Case) -> None:
    case.flags |= {
        "learning_rate": 1e-3,
        "warmup_ratio": 0.5,
        "lr_scheduler_type": "cosine",
        "data_path": case.tokenized,
    }
    assert run(train_jax.main, *case.argv()).code == 0
    expected = results(case.output)

    # As a person writes it: 1e-3 is a string in YAML 1.1, and an empty value is no value.
    values = {**{k: v if isinstance(v, int | float) else str(v) for k, v in case.flags.items()}, "cache_dir": None}
    text = yaml.safe_dump(values).replace("learning_rate: 0.001", "learning_rate: 1e-3")
    assert "1e-3" in text
    (case.folder / "run.yaml").write_text(text)
    again = case.folder / "again"
    assert run(train_jax.main, "--config", case.folder / "run.yaml", "--output_dir", again).code == 0
    assert results(again) == expected

    # The command line has the last word, wherever it stands.
    assert parse_arguments(["--max_steps", "7", "--config", str(case.folder / "run.yaml")]).max_steps == 7
    assert parse_arguments([f"--config={case.folder / 'run.yaml'}", "--learning_rate", "0.5"]).learning_rate == 0.5
    other = case.folder / "other"
    argv = ["--learning_rate", "0", "--output_dir", other, "--config", case.folder / "run.yaml"]
    assert run(train_jax.main, *argv).code == 0
    assert [e["learning_rate"] for e in log_entries(other)] == [0.0, 0.0]
    weights = load_file(other / "model.safetensors")
    assert all(np.array_equal(weights[name], a) for name, a in make_arrays(CONFIG).items())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_configs_parse(path: Path) -> None:
    """Each opens with the command that launches it, which takes the values of the file."""
    lines = path.read_text().splitlines()
    launch = [line.lstrip("# ") for line in lines if line.startswith("#") and "train_jax.py" in line]
    assert launch
    given = yaml.safe_load(path.read_text())
    for line in launch:
        words = shlex.split(line, comments=True)
        assert words[:2] == ["python", "train_jax.py"] and f"configs/{path.name}" in words
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            arguments = parse_arguments(words[2:])
        for key, value in given.items():
            assert value is None or f"--{key}" in words or getattr(arguments, key) in (value, str(value), [value]), key


PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "train_jax.py": lambda argv: parse_arguments(argv),
    "convert_torch_to_flax.py": lambda argv: convert.parse(argv),
    "llama_jax.generate": lambda argv: parse_generate(argv),
    "llama_jax.evaluate": lambda argv: parse_generate(argv, llama_jax.command.evaluate.main),
    "llama_jax.report": lambda argv: report.parse(argv),
    "llama_jax.parity": lambda argv: parity.parse(argv),
    "first_hour.py": lambda argv: first_hour.parse(argv),
    "tpu_compiler.py": lambda argv: tpu_compiler.parse(argv),
}


class Parsed(Exception):
    """The flags were good."""


def parse_generate(argv: list[str], main: Callable[[list[str]], int] = llama_jax.command.generate.main) -> None:
    def opened(*args: Any, **options: Any) -> None:
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(llama_jax.run.loaded, "Source", opened)
        patch.setattr(llama_jax.run.loaded, "set_up_jax", lambda *args: None)
        main(argv)


def check_command(words: list[str]) -> bool:
    """Parse one of our commands; False where it is none."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables set for the command
        words = words[1:]
    if not words or not re.fullmatch(r"(\S*/)?python(3(\.\d+)?)?", words[0]):
        return False
    name, argv = (words[2], words[3:]) if words[1:2] == ["-m"] else (Path(words[1]).name, words[2:])
    if name not in PARSERS:
        return False
    for end in ("|", "&&", ";", ">", "2>&1", "&"):
        argv = argv[: argv.index(end)] if end in argv else argv
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        PARSERS[name](argv)
    return True


def shown_commands(text: str) -> list[str]:
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.removeprefix("$ ") for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def test_commands_are_found() -> None:
    text = "a\n```bash\n# x\n$ python train_jax.py --max_steps \\\n   1 # y\nmake demo\n```\n```\npython z.py\n```\n"
    assert shown_commands(text) == ["python train_jax.py --max_steps  1 # y", "make demo"]


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_commands_of_the_pages_parse(path: Path) -> None:
    for line in shown_commands(path.read_text(encoding="utf-8")):
        check_command(shlex.split(line, comments=True))


def test_commands_of_the_demo_parse() -> None:
    text = (ROOT / "demo" / "run.sh").read_text().replace("$python", "python")
    lines = [line.strip() for line in text.splitlines() if line.startswith("python ")]
    assert lines and all(check_command(shlex.split(line)) for line in lines)


def test_tensors_of_the_helpers_are_transformers() -> None:
    """The names and shapes that the tests write folders with are HF's."""
    import torch
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    for tied in (False, True):
        raw = {**CONFIG, "tie_word_embeddings": tied, "attention_bias": True, "mlp_bias": True}
        with torch.device("meta"):
            model = LlamaForCausalLM(HFConfig(**raw))
        expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert expected == {n: s for n, s in hf_shapes(raw).items() if n in expected}
        assert expected.keys() | {"lm_head.weight"} == hf_shapes(raw).keys() | {"lm_head.weight"}
