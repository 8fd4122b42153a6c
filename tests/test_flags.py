"""The flags: all of the real TrainingArguments are accounted for, read by its grammar, checked as it checks.

The reference is hf_arguments.py: transformers 5 in this process, 4.37.2 in another one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_arguments
import pytest
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from hf_arguments import Server
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ROOT, run
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

import train_jax
from llama_jax.base.errors import InputError
from llama_jax.command.flags_page import flags_page
from llama_jax.setup.arguments import Arguments, flag_parser, parse_arguments
from llama_jax.setup.flags import _MEANT, ALIAS, BOTH, FLAGS, IMPLEMENTED, NEW, NO_MEANING, OLD, OPTIMIZERS, REFUSED
from llama_jax.setup.help import COMMON, GROUPS

NEEDED = ["--model_name_or_path", "m", "--data_path", "d.json"]
EVAL = ["--eval_data_path", "e.json"]
OTHERS = {flag.name: flag for flag in FLAGS}
MEND = r"\b(use|give|leave (it|this) out|upload)\b"


@pytest.fixture(scope="session")
def old() -> Iterator[Server]:
    server = Server()
    assert server.ask("version", None) == "4.37.2"
    yield server
    server.close()


@pytest.fixture(scope="session")
def live(old: Server) -> dict[str, dict[str, Any]]:
    """The flags of either version by its name."""
    return {OLD: old.ask("live_fields", None), NEW: hf_arguments.live_fields()}


def ask(compat: str, old: Server, function: str, argument: Any) -> Any:
    return old.ask(function, argument) if compat == OLD else getattr(hf_arguments, function)(argument)


def table() -> dict[str, list[str]]:
    """The page's rows of flags by their names: versions, default, status, meaning."""
    rows = {}
    for line in flags_page().split("## Values")[0].splitlines():
        if match := re.fullmatch(r"\| `--(\w+)` \| (.*) \|", line):
            rows[match[1]] = [cell.strip() for cell in match[2].split(" | ")]
    return rows


def shown(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str) and value else f"`{value!r}`"


# -- The table ---------------------------------------------------------------------------------------------------------


def test_page_is_the_generated_one() -> None:
    """Else: python -m llama_jax.command.flags_page > docs/flags.md"""
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == flags_page()


def test_every_flag_is_in_the_table(live: dict[str, dict[str, Any]]) -> None:
    rows = table()
    for compat, found in live.items():
        other = live[NEW if compat == OLD else OLD]
        for name, flag in found.items():
            versions, default, _, meaning = rows[name]
            assert versions == (BOTH if name in other else compat), name
            theirs = shown(flag["default"])
            assert theirs == default or f"{compat}'s default: {theirs.strip('`')}" in meaning, (name, compat, theirs)
    for name, (versions, *_) in rows.items():
        assert (versions in (OLD, NEW, BOTH)) == (name in live[OLD] or name in live[NEW]), name
    ours = {f.name for f in fields(Arguments)} | OTHERS.keys()
    assert rows.keys() == ours


def test_counts_of_the_page() -> None:
    statuses = [status for _, _, status, _ in table().values()]
    counts = ", ".join(f"{s} {statuses.count(s)}" for s in (IMPLEMENTED, ALIAS, NO_MEANING, REFUSED))
    assert f"Flags: {counts}.\n" in flags_page()


def another_value(name: str, flag: dict[str, Any]) -> str:
    """A value other than the default."""
    if flag["type"] == "bool":
        return "False" if flag["default"] is True else "True"
    if flag["choices"]:
        kept = [c for c in flag["choices"] if c not in (flag["default"], "best", "greedy", "batch_rebalance")]
        return {"optim": "sgd", "lr_scheduler_type": "cosine", "eval_strategy": "epoch"}.get(name, kept[0])
    if name in ("metric_for_best_model", "include_num_input_tokens_seen", "report_to"):
        return {"metric_for_best_model": "runtime", "report_to": "wandb"}.get(name, "True")
    if name == "deepspeed":
        return '{"gradient_clipping": "auto"}'  # without the key, DeepSpeed does not clip
    if name.endswith(("_kwargs", "_config")):
        return '{"a": 1}'
    return {"int": "7", "float": "0.25", "str": "word"}[flag["type"]]


def test_every_flag_does_what_the_table_says(live: dict[str, dict[str, Any]]) -> None:
    rows = table()
    for compat, found in live.items():
        for name, flag in found.items():
            status = rows[name][2]
            value = another_value(name, flag)
            extra = [*EVAL, "--eval_strategy", "steps"] if name in ("load_best_model_at_end", "eval_on_start") else EVAL
            base = [*NEEDED, *extra, "--hf_compat", compat]
            argv = [*base, f"--{name}", value]
            if status == REFUSED:
                outcome = run(train_jax.main, *argv)
                assert outcome.code == 2 and not outcome.out, (name, outcome)
                assert re.fullmatch(rf"error: --{name}: [^\n]*{MEND}[^\n]*\n", outcome.err), outcome.err
                continue
            arguments = parse_arguments(argv)
            said = set(arguments.notes("gpu")) ^ set(parse_arguments(base).notes("gpu"))
            said = {line for line in said if not line.startswith("--eval_data_path: no effect")}
            if status == IMPLEMENTED:
                kept = getattr(arguments, name)
                expected = {"include_num_input_tokens_seen": "all", "report_to": "['wandb']"}.get(name, value)
                assert str(kept) in (expected, f"{expected}.0"), (name, kept)
                assert not said or (name, compat) == ("data_seed", OLD), said
            else:
                (line,) = said
                word = "read as" if status == ALIAS else "no meaning here"
                assert line.startswith(f"--{name}: {word}") and "\n" not in line, line
    # No flag of the Trainer, but of the seed's command.
    (line,) = parse_arguments([*NEEDED, "--loggingdir", "x"]).notes("cpu")
    assert line.startswith("--loggingdir: read as --logging_dir")


def test_nothing_is_said_of_defaults(live: dict[str, dict[str, Any]]) -> None:
    for found in live.values():
        for name, flag in found.items():
            if flag["default"] not in (None, "", [], {}, "required") and name != "optim":
                value = parse_arguments([*NEEDED, f"--{name}", str(flag["default"])])
                assert not value.notes("cpu"), name


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("--evaluation_strategy epoch", {"eval_strategy": "epoch"}),
        ("--eval_strategy steps --evaluation_strategy no", {"eval_strategy": "no"}),
        ("--no_cuda False --use_cpu", {"use_cpu": True}),
        ("--per_gpu_train_batch_size 3 --per_device_train_batch_size 5", {"per_device_train_batch_size": 3}),
        ("--per_gpu_eval_batch_size 3", {"per_device_eval_batch_size": 3}),
        ("--no_cuda", {"use_cpu": True}),
        ("--adafactor --optim sgd", {"optim": "adafactor"}),
        ("--group_by_length", {"train_sampling_strategy": "group_by_length"}),
        ("--activation_checkpointing True", {"gradient_checkpointing": True}),
        ("--activation_checkpointing False --gradient_checkpointing True", {"gradient_checkpointing": False}),
        ("--optim adamw_torch_fused", {"optim": "adamw_torch"}),
        ("--optim paged_lion_32bit", {"optim": "lion_32bit"}),
        ("--optim paged_adamw_32bit --weight_decay 0.1", {"optim": "adamw_torch", "weight_decay": 0.1}),
        ("--include_num_input_tokens_seen", {"include_num_input_tokens_seen": "all"}),
        ("--include_num_input_tokens_seen Yes", {"include_num_input_tokens_seen": "all"}),
        ("--include_num_input_tokens_seen False", {"include_num_input_tokens_seen": "no"}),
        ("--explain", {"explain": "text"}),
        ("--explain json", {"explain": "json"}),
        ("--lr_scheduler_kwargs {\"num_cycles\":2}", {"schedule_kwargs": {"num_cycles": 2}}),
        ("--metric_for_best_model loss", {"best_metric_key": "eval_loss", "greater_is_better": False}),
        ("--report_to wandb tensorboard", {"report_to": ["wandb", "tensorboard"]}),
        ("--loggingdir ./log", {"logging_dir": "./log"}),
    ],
)  # fmt: skip
def test_meaning(words: str, meant: dict[str, Any]) -> None:
    arguments = parse_arguments([*NEEDED, *EVAL, *words.split()])
    assert {name: getattr(arguments, name) for name in meant} == meant


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("--data_seed 1", "--data_seed"),
        ("--no_average_tokens_across_devices", "--average_tokens_across_devices"),
        ("--eval_data_path e", "--eval_data_path"),
        ("--warmup_ratio 0.1 --warmup_steps 3", "--warmup_ratio"),
        ("--tf32 True", "--tf32"),
        ("--max_tokens_per_device 128 --packing False", "--max_tokens_per_device"),
    ],
)
def test_what_has_no_effect_is_said(words: str, flag: str) -> None:
    (line,) = parse_arguments([*NEEDED, *words.split()]).notes("cpu")
    assert line.startswith(f"{flag}")
    now = ["--hf_compat", "5", *EVAL, "--eval_strategy", "epoch"]
    quiet = words.replace("--warmup_ratio 0.1", "").replace("--eval_data_path e", "").replace("--packing False", "")
    assert not parse_arguments([*NEEDED, *now, *quiet.split()]).notes("gpu")


def test_every_optimizer(live: dict[str, dict[str, Any]], old: Server) -> None:
    values = {OLD: old.ask("optimizers", None), NEW: hf_arguments.optimizers()}
    assert OPTIMIZERS.keys() == {*values[OLD], *values[NEW]}
    for name, (versions, status, _) in OPTIMIZERS.items():
        assert (name in values[OLD], name in values[NEW]) == (versions != NEW, versions != OLD), name
        argv = [*NEEDED, "--optim", name]
        if status == REFUSED:
            with pytest.raises(InputError, match=rf"^--optim {name}: .*{MEND}"):
                parse_arguments(argv)
            continue
        arguments = parse_arguments(argv)
        assert OPTIMIZERS[arguments.optim][1] == IMPLEMENTED
        paged = (
            "; for a state in the host's memory there is --offload_optimizer True" if name.startswith("paged") else ""
        )
        expected = [f"--optim {name}: read as {arguments.optim}{paged}"] if status == ALIAS else []
        assert arguments.notes("cpu") == expected
    for typed, meant in {
        **{"adam": "adamw_torch", "adamw": "adamw_torch", "lion": "lion_32bit", "adamw_torhc": "adamw_torch"},
        **{"adafacter": "adafactor", "muon": "adamw_torch", "paged_lion_8bit": "lion_32bit", "rmsprop": "adamw_torch"},
        **{"galore_adafactor": "adafactor", "schedule_free_sgd": "sgd", "adamw_torch_8bit": "adamw_torch"},
    }.items():
        with pytest.raises(InputError, match=rf"^--optim {typed}: .*use {meant}\b"):
            parse_arguments([*NEEDED, "--optim", typed])
    for typed, meant in {"adamw_torch_4bit": "adamw_torch", "lion_8bit": "lion_32bit"}.items():
        with pytest.raises(InputError, match=rf"use {meant}, or adamw_8bit for a smaller state$"):
            parse_arguments([*NEEDED, "--optim", typed])
    for optim in ("adamw_8bit", "sgd", "paged_adamw_8bit"):
        with pytest.raises(
            InputError, match=r"^--adam_moments_dtype bfloat16: is for --optim adamw_torch.*leave it out"
        ):
            parse_arguments([*NEEDED, "--optim", optim, "--adam_moments_dtype", "bfloat16"])
    with pytest.raises(InputError, match="adam_moments_dtype"):
        parse_arguments([*NEEDED, "--adam_moments_dtype", "float16"])


def test_every_schedule(old: Server) -> None:
    for name in {*old.ask("schedules", None), *hf_arguments.schedules()}:
        argv = [*NEEDED, *EVAL, "--eval_strategy", "epoch", "--lr_scheduler_type", name]
        assert parse_arguments(argv).lr_scheduler_type == name


# -- The grammar -------------------------------------------------------------------------------------------------------

# A value of these cannot be read from the real command lines; here it is, for a line that says more or for a meaning.
# And --optim, whose unknown values are refused after parsing.
WIDER = {"include_num_input_tokens_seen", "liger_kernel_config", "parallelism_config", "optim"}
PARSER = flag_parser()
GOOD = {
    "bool": ["True", "false", "YES", "n", "1", "0", "t"],
    "int": ["0", "3", "-1"],
    "float": ["0.03", "1e-3", "7", "-2", ".5"],
    "str": ["word", "-", "a b", '{"a": 1}'],
}
BAD = ["on", "2", "2.5", "x", "steps", "adamw_hf", "adafactor"]


@st.composite
def spelled(draw: st.DrawFn, name: str, flag: dict[str, Any], wild: bool) -> list[str]:
    """One flag on a command line: whole, with dashes or cut short, a value apart or joined. Wild: none or a bad one."""
    if flag["default"] is True and draw(st.booleans()):
        return [f"--no_{name}"]
    written = name[: draw(st.integers(max(3, len(name) - 6), len(name)))] if draw(st.integers(0, 3)) == 0 else name
    if draw(st.booleans()):
        written = written.replace("_", "-")
    if draw(st.integers(0, 2)) == 0 and (wild or flag["type"] == "bool"):
        return [f"--{written}"]
    words = st.sampled_from(BAD if wild and draw(st.booleans()) else flag["choices"] or GOOD[flag["type"]])
    given = [str(draw(words)) for _ in range(draw(st.integers(1, 2)) if flag["many"] else 1)]
    return [f"--{written}={given[0]}"] if draw(st.integers(0, 3)) == 0 else [f"--{written}", *given]


def real_parse(compat: str, old: Server, argv: list[str]) -> dict[str, Any] | None:
    if compat == NEW:
        return hf_arguments.parse(argv)
    # Dashes within names came after 4.37.
    plain = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in argv]
    return old.ask("parse", plain)


def our_parse(argv: list[str]) -> tuple[dict[str, Any] | None, str]:
    """The values before any check, None with the reason where the command line is refused."""
    try:
        values, unknown = PARSER.parse_known_args(argv)
    except InputError as e:
        return None, str(e)
    return (None, "unknown") if unknown else (vars(values), "")


def same(ours: Any, real: Any) -> bool:
    if isinstance(ours, list) and not isinstance(real, list):  # 5 takes one word where 4.37 takes several
        ours = ours[0] if len(ours) == 1 else ours
    if isinstance(real, float | int) and not isinstance(real, bool):
        return ours == real
    return str(ours) == str(real)


def test_every_flag_reads_its_values(live: dict[str, dict[str, Any]], old: Server) -> None:
    """One flag at a time, by every kind of word: read as a real parser reads it, refused where both refuse."""
    for name in sorted((live[OLD].keys() | live[NEW].keys()) - WIDER):
        flags = [live[compat][name] for compat in (OLD, NEW) if name in live[compat]]
        words = [*BAD, *(w for f in flags for w in f["choices"] or GOOD[f["type"]])]
        lines = [[f"--{name}", str(w)] for w in words] + [[f"--{name}"], [f"--no_{name}"], [f"--{name}", "a", "b"]]
        for argv in lines:
            reals = [r for r in (real_parse(compat, old, argv) for compat in (OLD, NEW)) if r is not None]
            ours, reason = our_parse(argv)
            assert (ours is None) == (not reals), (argv, reason, reals)
            assert ours is None or all(same(ours[name], real[name]) for real in reals), (argv, ours[name])


@settings(max_examples=150)
@given(st.data())
def test_grammar_is_the_trainers(live: dict[str, dict[str, Any]], old: Server, data: st.DataObject) -> None:
    """What the real parser of a version reads has the same values here; what both refuse is refused here."""
    compat = data.draw(st.sampled_from([OLD, NEW]))
    wild = data.draw(st.booleans())
    some = st.lists(st.sampled_from(sorted(live[compat].keys() - WIDER)), min_size=1, max_size=1 if wild else 4)
    names = data.draw(some)
    argv = [w for n in names for w in data.draw(spelled(n, live[compat][n], wild))]
    real, (ours, reason) = real_parse(compat, old, argv), our_parse(argv)
    if ours is None and reason.startswith("unknown argument"):
        # A prefix of a flag that only the other version or this one has, or of a name with `_` and with `-`.
        written = [re.sub("=.*", "", w)[2:].replace("-", "_") for w in argv if w.startswith("--")]
        assert not all(name.removeprefix("no_") in names for name in written), argv
        return
    if real is not None:
        assert ours is not None, (argv, reason)
        given = [n for n in names if not same(real[n], live[compat][n]["default"])]
        assert all(same(ours[n], real[n]) for n in given), [(n, ours[n], real[n]) for n in given]
    elif len(names) == 1:
        other = real_parse(NEW if compat == OLD else OLD, old, argv)
        assert (ours is None) == (other is None), (argv, reason, other)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_files_of_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yaml = write(
        tmp_path / "a.yaml", "model_name_or_path: m\ndata_path: d\nreport_to: [wandb, mlflow]\nlearning_rate: 1e-3\n"
    )
    yml = write(tmp_path / "a.yml", Path(yaml).read_text())
    values = {"model_name_or_path": "m", "data_path": "d", "report_to": ["wandb", "mlflow"], "learning_rate": 1e-3}
    values |= {"lr_scheduler_kwargs": {"num_cycles": 3}, "bf16": True, "max_steps": -1, "tf32": None}
    file = write(tmp_path / "a.json", json.dumps(values, indent="\t"))  # YAML takes no tabs
    for argv in ([yaml], [yml], ["--config", yaml], ["--conf", yaml], [file], ["--config", file]):
        arguments = parse_arguments(argv)
        assert (arguments.model_name_or_path, arguments.learning_rate) == ("m", 1e-3)
        assert not arguments.notes("cpu") and arguments.report_to == ["wandb", "mlflow"]
        assert arguments.schedule_kwargs == ({"num_cycles": 3} if argv[-1] == file else {})
    assert arguments.bf16
    write(tmp_path / "bad.json", '{"bf16": tru}')
    with pytest.raises(InputError, match=r"bad\.json: not valid JSON"):
        parse_arguments([str(tmp_path / "bad.json")])

    kwargs = write(tmp_path / "kwargs.json", '{"power": 2}')
    assert parse_arguments([*NEEDED, "--lr_scheduler_kwargs", kwargs]).schedule_kwargs == {"power": 2}
    for bad in ('{"power": }', "nowhere.json", yaml):
        with pytest.raises(InputError, match="--lr_scheduler_kwargs"):
            parse_arguments([*NEEDED, "--lr_scheduler_kwargs", bad])

    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_arguments(["--config", "~/a.yaml", "--output_dir=~/out"]).output_dir == f"{tmp_path}/out"


@pytest.mark.parametrize(
    ("config", "words", "meant"),
    [
        ("evaluation_strategy: steps", "--eval_strategy no", {"eval_strategy": "no"}),
        ("evaluation_strategy: steps", "--evaluation_strategy no", {"eval_strategy": "no"}),
        ("evaluation_strategy: steps", "--eval-strat=epoch", {"eval_strategy": "epoch"}),
        ("eval_strategy: steps", "--evaluation_strategy no", {"eval_strategy": "no"}),
        ("per_gpu_train_batch_size: 4", "--per_device_train_batch_size 1", {"per_device_train_batch_size": 1}),
        ("per_device_train_batch_size: 4", "--per_gpu_train_batch_size 1", {"per_device_train_batch_size": 1}),
        ("per_gpu_train_batch_size: 4", "--per_gpu_eval_batch_size 1", {"per_device_train_batch_size": 4}),
        ("activation_checkpointing: true", "--gradient_checkpointing False", {"gradient_checkpointing": False}),
        ("gradient_checkpointing: true", "--activation_checkpointing False", {"gradient_checkpointing": False}),
        ("no_cuda: true", "--use_cpu False", {"use_cpu": False}),
        ("adafactor: true", "--optim sgd", {"optim": "sgd"}),
        ("optim: sgd", "--adafactor", {"optim": "adafactor"}),
        ("optim: sgd", "--adafactor False", {"optim": "sgd"}),
        ("group_by_length: true", "--train_sampling_strategy sequential", {"train_sampling_strategy": "sequential"}),
        ("train_sampling_strategy: sequential", "--group_by_length", {"train_sampling_strategy": "group_by_length"}),
        ("evaluation_strategy: no", "--eval_steps 3", {"eval_strategy": "no"}),
        ("eval_strategy: no\nsave_strategy: NO\nlogging_strategy: off", "", {"save_strategy": "no"}),
    ],
)
def test_the_command_line_overrides_a_file_under_any_name(
    tmp_path: Path, config: str, words: str, meant: dict[str, Any]
) -> None:
    file = write(tmp_path / "a.yaml", config)
    arguments = parse_arguments([*NEEDED, *EVAL, *words.split(), "--config", file])
    assert {name: getattr(arguments, name) for name in meant} == meant


def test_a_config_file_without_its_flag(tmp_path: Path) -> None:
    """Taken as the first argument; elsewhere the error names the fix."""
    file = write(tmp_path / "a.yaml", "model_name_or_path: m\ndata_path: d\nlearning_rate: 1e-3\n")
    assert parse_arguments([file, "--seed", "3"]).learning_rate == 1e-3
    assert parse_arguments([file, "--learning_rate", "1"]).learning_rate == 1
    for argv in ([*NEEDED, file], ["--config", file, file], [file, "--config", file], [file, file]):
        with pytest.raises(InputError, match=rf"^unknown argument {file}; give one config file, as --config {file}$"):
            parse_arguments(argv)
    with pytest.raises(InputError, match=r"^unknown argument True; a value belongs after its flag"):
        parse_arguments([*NEEDED, "--bf16", "True", "True"])
    with pytest.raises(InputError, match=r"^unknown argument -lr; use --learning_rate$"):
        parse_arguments([*NEEDED, "-lr", "1"])
    for key in ("config", "help"):
        with pytest.raises(InputError, match=rf"^--config .*unknown flag '{key}'"):
            parse_arguments([write(tmp_path / "b.yaml", f"{key}: c.yaml")])


@pytest.mark.parametrize(
    ("typed", "advice"),
    [
        ("lr", "use --learning_rate"),
        ("epochs", "use --num_train_epochs"),
        ("batch_size", "use --per_device_train_batch_size"),
        ("gradient_accumulation", None),  # a prefix
        ("grad_accum", "use --gradient_accumulation_steps"),
        ("lr_scheduler", "use --lr_scheduler_type"),
        ("warmup", "use --warmup_steps or --warmup_ratio"),
        ("max_length", "use --model_max_length"),
        ("max_seq_length", "use --model_max_length"),
        ("dataset", "use --data_path"),
        ("data", "use --data_path"),
        ("model", "use --model_name_or_path"),
        ("output", "use --output_dir"),
        ("optimizer", "use --optim"),
        ("torch_dtype", "use --bf16 True"),
        ("num_gpus", "use --mesh"),
        ("gpus", "use --mesh"),
        ("quantization_bit", "use --load_in_4bit True or --load_in_8bit True, with --use_peft True"),
        ("use_lora", "use --use_peft True"),
        ("adapter", "use --use_peft True"),
        ("lora_rank", "use --use_peft True, with --lora_r"),
        ("logging", "could mean --logging_"),
        ("logging_st", "could mean --logging_strategy or --logging_steps"),
        ("learning_rat", None),
        ("learning_rtae", "did you mean --learning_rate?"),
        ("quite_another", "--help all"),
    ],
)
def test_advice_for_names_that_are_no_flags(tmp_path: Path, typed: str, advice: str | None) -> None:
    for spelled in (typed, typed.replace("_", "-")):
        for words in ([f"--{spelled}", "4"], [f"--{spelled}=4"]):
            if advice is None:
                assert parse_arguments([*NEEDED, *words]).data_path == ["d.json"]
                continue
            with pytest.raises(InputError) as refused:
                parse_arguments([*NEEDED, *words])
            assert str(refused.value).startswith(f"unknown argument --{spelled}; {advice}"), refused.value
            assert "-" not in str(refused.value).partition("could mean")[2].replace("--", "")
    if advice and "use" in advice:
        with pytest.raises(InputError, match=rf"a\.yaml: unknown flag '{typed}'; {advice}"):
            parse_arguments([write(tmp_path / "a.yaml", f"{typed}: 4")])


def test_advice_names_flags_that_work() -> None:
    for name, advice in _MEANT.items():
        named = re.findall(r"--(\w+)", advice)
        assert all(flag in Arguments.__dataclass_fields__ for flag in named), advice
        assert name not in Arguments.__dataclass_fields__ and name not in OTHERS


# -- The help ----------------------------------------------------------------------------------------------------------


def help_lines(*words: str) -> list[str]:
    outcome = run(train_jax.main, *words)
    assert outcome.code == 0 and not outcome.err
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) <= 100
    return lines


def test_help_shows_the_common_flags_in_groups() -> None:
    lines = help_lines("--help")
    assert lines == help_lines("-h") == help_lines("--learning_rate", "x", "--help")
    assert len(lines) < 50
    flags = [line.split()[0][2:] for line in lines if re.match("  --", line)]
    assert sorted(flags) == sorted(COMMON)
    for line in lines:  # a line each, with its default
        if match := re.match(r"  --(\w+) +\S", line):
            default = Arguments.__dataclass_fields__[match[1]].default
            assert default in (None, "") or line.endswith(f"(default: {default})")
    titles = [line[:-1] for line in lines if re.match("[A-Z].*:$", line) and line != "Example:"]
    assert titles == list(GROUPS.values())
    assert any("python train_jax.py --model_name_or_path" in line for line in lines)
    assert "--help all" in lines[-1] and "docs/flags.md" in lines[-1]


def test_help_all_names_every_flag_once() -> None:
    lines = help_lines("--help", "all")
    assert len(lines) < 300
    headed = [re.match(r"  (--\w+)(?=  |$)|  ((?:--\w+, )*--\w+[,:])$", line) for line in lines]
    named = [name for match in headed if match for name in re.findall(r"--(\w+)", match[0])]
    assert sorted(named) == sorted([*Arguments.__dataclass_fields__, *OTHERS])
    assert GROUPS.keys() <= Arguments.__dataclass_fields__.keys()


def test_help_needs_no_large_import() -> None:
    code = (
        "import sys, train_jax\ntry: train_jax.main(['--help'])\n"
        "except SystemExit as e: print(e.code, [m for m in ('transformers', 'jax', 'torch') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "0 []", result.stdout + result.stderr


def test_args_file_beside_the_script(tmp_path: Path) -> None:
    """`train_jax.args` is read where train_jax.py is, not where the caller or the working folder is."""
    there, here = tmp_path / "there", tmp_path / "here"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "llama_jax", there / "llama_jax", ignore=ignored)
    shutil.copy(ROOT / "train_jax.py", there)
    here.mkdir()
    write(there / "train_jax.args", "--weight_decay 7 --learning_rate -2")
    for name in ("train_jax.args", "caller.args"):
        write(here / name, "--weight_decay -7")
    call = f"import sys; sys.path.insert(0, {str(there)!r})\nfrom train_jax import main, run_command\n"
    command = [sys.executable, write(here / "caller.py", f"{call}sys.exit(run_command(main))"), *NEEDED]
    result = subprocess.run(command, cwd=here, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert result.returncode == 2
    assert result.stderr == "error: --learning_rate -2.0: should not be below 0\n"


# -- The checks --------------------------------------------------------------------------------------------------------

STEPS = [0, 0.01, 0.07, 0.1, 0.25, 0.3, 0.5, 1, 2, 2.5, 3, 4, 500]
COMBINATIONS = st.fixed_dictionaries(
    {},
    optional={
        "eval_strategy": st.sampled_from(["no", "steps", "epoch"]),
        "save_strategy": st.sampled_from(["no", "steps", "epoch", "best"]),
        "logging_strategy": st.sampled_from(["no", "steps", "epoch"]),
        "eval_steps": st.sampled_from(STEPS),
        "save_steps": st.sampled_from(STEPS),
        "logging_steps": st.sampled_from(STEPS),
        "load_best_model_at_end": st.sampled_from([True, True, False]),
        "metric_for_best_model": st.sampled_from(["loss", "eval_loss", "eval_runtime", "samples_per_second"]),
        "greater_is_better": st.booleans(),
        "lr_scheduler_type": st.sampled_from(["linear", "reduce_lr_on_plateau", "greedy"]),
        "warmup_steps": st.sampled_from([0, 3, 5, -1]),
    },
)
# Where the intervals are compared.
MULTIPLES = st.fixed_dictionaries(
    {
        **dict.fromkeys(("eval_strategy", "save_strategy"), st.just("steps")),
        **dict.fromkeys(("eval_steps", "save_steps"), st.sampled_from(STEPS[1:])),
        "load_best_model_at_end": st.just(True),
    }
)


def stricter(values: dict[str, Any]) -> bool:
    """Whether the Trainer takes values that are refused here, as docs/flags.md says."""
    v = {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 500, "logging_steps": 500, **values}
    saves, evaluates = v["save_strategy"], v["eval_strategy"]
    mixed = evaluates == "steps" and (v["save_steps"] < 1) != ((v.get("eval_steps") or v["logging_steps"]) < 1)
    return (
        (saves == "steps" and v["save_steps"] == 0)
        or (saves == "best" and (evaluates == "no" or "metric_for_best_model" not in v))
        or (saves == evaluates == "steps" and bool(v.get("load_best_model_at_end")) and mixed)
        or v.get("warmup_steps") == -1
    )


@settings(max_examples=150)
@given(COMBINATIONS | MULTIPLES, st.sampled_from([OLD, NEW]))
def test_checks_are_the_trainers(old: Server, values: dict[str, Any], compat: str) -> None:
    if compat == OLD:  # it has neither
        values = {k: v for k, v in values.items() if v not in ("best", "greedy")}
    renamed = {("evaluation_strategy" if compat == OLD and k == "eval_strategy" else k): v for k, v in values.items()}
    real = ask(compat, old, "settle", renamed)
    flags = [word for k, v in renamed.items() for word in (f"--{k}", str(v))]
    try:
        ours = parse_arguments([*NEEDED, *EVAL, "--hf_compat", compat, *flags])
    except InputError as e:
        assert isinstance(real, str) or stricter(values), (real, str(e))
        return
    if isinstance(real, str):
        # The Trainer compares shares as binary fractions.
        assert "multiple" in real, real
        assert ours.eval_steps
        saved, evaluated = Fraction(str(ours.save_steps)), Fraction(str(ours.eval_steps))
        assert saved < 1 and evaluated < 1 and saved % evaluated == 0
        return
    assert {name: getattr(ours, name) for name in real} == real


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--eval_strategy steps", ["--eval_strategy steps", "--eval_data_path"]),
        ("--eval_on_start", ["--eval_on_start", "--eval_data_path"]),
        ("--eval_data_path e --validation_split_percentage 5", ["--validation_split_percentage", "--eval_data_path"]),
        ("--validation_split_percentage 100", ["--validation_split_percentage 100", "below 100"]),
        ("--validation_split_percentage -1", ["--validation_split_percentage -1"]),
        ("--eval_data_path e --metric_for_best_model accuracy", ["--metric_for_best_model accuracy", "eval_loss"]),
        ("--eval_data_path e --eval_strategy steps --eval_steps -2", ["--eval_steps -2", "above 0"]),
        ("--eval_data_path e --eval_delay nan --eval_strategy epoch", ["--eval_delay"]),
        ("--adam_beta1 1", ["--adam_beta1 1", "below 1"]),
        ("--adam_beta2 1.0", ["--adam_beta2 1", "below 1"]),
        ("--label_smoothing_factor 1", ["--label_smoothing_factor 1", "below 1"]),
        ("--include_num_input_tokens_seen some", ["--include_num_input_tokens_seen some", "non_padding"]),
        ("--train_sampling_strategy batch_rebalance", ["--train_sampling_strategy batch_rebalance", "use random"]),
        ("--optim adamw_torhc", ["--optim adamw_torhc", "adamw_torch"]),
        ("--accelerator_confg {}", ["--accelerator_confg", "did you mean --accelerator_config?"]),
        ("--fsdp_config {1}", ["--fsdp_config", "not valid JSON"]),
    ],
)
def test_refused(flags: str, named: list[str]) -> None:
    with pytest.raises(InputError) as refused:
        parse_arguments([*NEEDED, *flags.split()])
    assert all(part in str(refused.value) for part in named), refused.value
    assert str(refused.value).startswith(("--", "unknown argument"))


def test_names_of_losses() -> None:
    """greater_is_better by the name, where it is not given: 4.37 knows two losses, 5 whatever ends in loss."""
    for compat in (OLD, NEW):
        arguments = Arguments(metric_for_best_model="other_loss", hf_compat=compat)
        arguments.settle()
        assert arguments.greater_is_better == (compat == OLD)


# -- What is due when --------------------------------------------------------------------------------------------------


class Updates:
    """A run of epochs of `per_epoch` updates that may end inside one. The last update of an epoch is `tail` before its
    end, as in 4.37 where a tail of micro-batches is carried over.
    """

    def __init__(self, updates: int, per_epoch: int, tail: float):
        self.updates = updates
        self.epochs = [k / per_epoch - (0 if k % per_epoch else tail) for k in range(updates + 1)]
        self.ends = {k for k in range(1, updates + 1) if k % per_epoch == 0} | {updates}

    def epoch_ends(self) -> set[int]:
        return self.ends

    def epoch_at(self, updates_done: int) -> float:
        return self.epochs[updates_done]


@settings(max_examples=300)
@given(
    compat=st.sampled_from([OLD, NEW]),
    order=st.builds(Updates, st.integers(1, 13), st.integers(1, 5), st.sampled_from([0.0, 0.125])),
    strategies=st.tuples(*[st.sampled_from(["no", "steps", "epoch"])] * 3),
    steps=st.tuples(*[st.sampled_from([0.1, 0.3, 1, 2, 3, 5, 500])] * 3),
    delay=st.sampled_from([0, 1, 1.5, 2, 3]),
    first=st.booleans(),
)
def test_due_is_the_callbacks(
    old: Server,
    compat: str,
    order: Updates,
    strategies: tuple[str, ...],
    steps: tuple[float, ...],
    delay: float,
    first: bool,
) -> None:
    names = ("logging", "eval", "save")
    values = {f"{n}_strategy": s for n, s in zip(names, strategies, strict=True)} | {
        f"{n}_steps": s for n, s in zip(names, steps, strict=True)
    }
    values |= {"eval_delay": delay, "logging_first_step": first}
    arguments = Arguments(hf_compat=compat, **values)
    arguments.settle()
    if compat == OLD:
        values["evaluation_strategy"] = values.pop("eval_strategy")
    case = {"values": values, "epoch": order.epochs[1:], "ends": sorted(order.ends)}
    real = ask(compat, old, "due", case)
    for name in names:
        at = arguments.due(name, order)
        assert [k for k in range(1, order.updates + 1) if at(k)] == real[name], name


def test_best_is_not_due_by_itself() -> None:
    arguments = Arguments(save_strategy="best", hf_compat="5")
    at = arguments.due("save", Updates(4, 2, 0.0))
    assert not any(at(k) for k in range(1, 5))


class RealDeepSpeed(HfTrainerDeepSpeedConfig, HfDeepSpeedConfig):
    """transformers' own comparison, without the check that deepspeed is installed."""

    def __init__(self, settings: dict[str, Any]):
        HfDeepSpeedConfig.__init__(self, settings)
        self._dtype, self.mismatches = None, []


NUMBERS = st.sampled_from(["auto", 1, 2, 0.5, 1e-5, 5e-5, 0.9])
SWITCHES = st.fixed_dictionaries({}, optional={"enabled": st.sampled_from(["auto", True, False])})
DEEPSPEED = st.fixed_dictionaries(
    {},
    optional={
        "train_micro_batch_size_per_gpu": NUMBERS,
        "gradient_accumulation_steps": NUMBERS,
        "gradient_clipping": NUMBERS,
        "optimizer": st.fixed_dictionaries(
            {"params": st.dictionaries(st.sampled_from(["lr", "eps", "weight_decay"]), NUMBERS)}
        ),
        "scheduler": st.fixed_dictionaries({"params": st.fixed_dictionaries({}, optional={"warmup_max_lr": NUMBERS})}),
        "bf16": SWITCHES,
        "fp16": SWITCHES,
        "zero_optimization": st.fixed_dictionaries({"stage": st.integers(0, 3)}),
    },
)


@settings(max_examples=80)
@given(DEEPSPEED, st.sampled_from([[1, 2], [2, 1]]), NUMBERS.filter(lambda x: x != "auto"), st.booleans())
def test_deepspeeds_file_is_compared_as_the_trainer_does(
    settings: dict[str, Any], sizes: list[int], number: float, bf16: bool
) -> None:
    """A line for each setting that the Trainer refuses, named by the same key, and for a clip that is missing."""
    batch, accumulated = sizes
    words = (
        f"--per_device_train_batch_size {batch} --gradient_accumulation_steps {accumulated} --max_grad_norm {number}"
    )
    words += f" --learning_rate {number} --weight_decay {number} --adam_epsilon {number}"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", raising=False)
        args = parse_arguments([*NEEDED, *words.split(), "--deepspeed", json.dumps(settings)])
    real = RealDeepSpeed(json.loads(json.dumps(settings)))
    theirs = SimpleNamespace(**vars(args) | {"world_size": 1}, fp16=False, fp16_full_eval=False, bf16_full_eval=False)
    theirs.save_on_each_node = False
    real.trainer_config_process(theirs)
    expected = {line.split()[2].partition("=")[0] for line in real.mismatches}
    lines = [line.removeprefix("--deepspeed: ") for line in args.notes("gpu") if line.startswith("--deepspeed: ")][1:]
    expected |= {"zero_optimization.stage"} & {f"{key}.stage" for key in settings}
    expected |= {"gradient_clipping"} - settings.keys()
    assert sorted(line.split()[0] for line in lines) == sorted(expected), lines


def test_deepspeeds_files(tmp_path: Path) -> None:
    """A stage's own settings, and the names of schedules and optimizers; files that cannot be read."""
    file = tmp_path / "zero2.json"
    written = {
        "train_batch_size": 64,
        "gradient_clipping": "auto",
        "optimizer": {"type": "Lion", "params": {"betas": [0.9, 0.95]}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 7}},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    file.write_text(json.dumps(written))
    argv = [*NEEDED, "--gradient_accumulation_steps", "4", "--warmup_steps", "7", "--deepspeed", str(file)]
    assert parse_arguments(argv).notes("gpu")[1:] == [
        "--deepspeed: optimizer.params.betas is [0.9, 0.95] there; the flags decide: --adam_beta1 0.9 "
        "--adam_beta2 0.999",
        '--deepspeed: optimizer.type is "Lion" there; the flags decide: --optim adamw_torch',
        "--deepspeed: scheduler.type WarmupDecayLR warms up by the logarithm of the update unless warmup_type is "
        "linear; here the learning rate rises linearly",
        "--deepspeed: train_batch_size is 64 there, which is 2 device(s) of --per_device_train_batch_size 8 x "
        "--gradient_accumulation_steps 4; here --world_size counts, by default the devices of data x fsdp in --mesh",
        '--deepspeed: zero_optimization.offload_optimizer.device is "cpu" there; the flags decide: --offload_optimizer '
        "False",
        "--deepspeed: zero_optimization.stage 2 changes memory, not the updates; --mesh auto divides all of the state, "
        "as stage 3 does",
    ]
    for text, said in (
        (None, "zero.json: no such file; give a JSON object, or a file that holds it"),
        ("{'a': 1}", "zero.json: not valid JSON at line 1, column 2: Expecting property name"),
        ("[1]", "zero.json: should be a JSON object"),
    ):
        if text:
            (tmp_path / "zero.json").write_text(text)
        with pytest.raises(InputError) as refused:
            parse_arguments([*NEEDED, "--deepspeed", str(tmp_path / "zero.json")])
        assert said in str(refused.value) and str(refused.value).startswith("--deepspeed ")


def test_data_is_named_by_several_words_and_commas(tmp_path: Path) -> None:
    """A comma of a path that exists separates nothing; the scripts' names are aliases."""
    odd = write(tmp_path / "a,b.json", "[]")
    given = {
        ("--data_path", "a", "b,c", odd): ["a", "b", "c", odd],
        ("--data_path=a, b",): ["a", "b"],
        ("--train_file", "a,b"): ["a", "b"],
        ("--dataset_name", "org/name", "--dataset_config_name", "x"): ["org/name"],
        ("--data_path", "gs://a/b", "~"): ["gs://a/b", os.path.expanduser("~")],
        ("--config", write(tmp_path / "a.yaml", "data_path: [a, b]")): ["a", "b"],
        ("--config", write(tmp_path / "b.yaml", "data_path: [a, b]"), "--data_path", "c"): ["c"],
    }
    for words, names in given.items():
        arguments = parse_arguments(["--model_name_or_path", "m", *words])
        assert arguments.data_path == names
        assert arguments.dataset_config_name == ("x" if "x" in words else None)
    arguments = parse_arguments([*NEEDED, "--validation_file", "e,f"])
    assert arguments.eval_data_path == ["e", "f"]
    assert "--validation_file: read as --eval_data_path" in arguments.notes("cpu")
