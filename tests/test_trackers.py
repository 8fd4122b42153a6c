"""Run `--report_to` against the real HF Trainer with the real clients in their local modes, and without clients."""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import tomllib
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import hf_trainer
import numpy as np
import pytest
import reference
from test_training import Job
from tiny import CONFIG, ROOT, environment, hf_shapes, make_records, run, slow_unless, write_json, write_model
from tracker_files import Written
from transformers.integrations import integration_utils

import train_jax
from llama_jax.base.errors import InputError
from llama_jax.reporting import platforms, trackers
from llama_jax.reporting.platforms import PLATFORMS, choose
from llama_jax.reporting.trackers import open_trackers
from llama_jax.reporting.trainer_arguments import trainer_arguments
from llama_jax.setup.arguments import parse_arguments

# `make test` installs the light clients into a folder of their own; every other test runs without any.
CLIENTS = Path(sysconfig.get_path("purelib", vars={"base": str(Path(sys.prefix) / "trackers")}))
NEEDED = ["--model_name_or_path", "m", "--data_path", "d.json"]
CLOCK = re.compile("runtime$|_per_second$|duration$")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, records to train on and records to evaluate."""
    folder = tmp_path_factory.mktemp("trackers")
    write_model(folder / "model")
    write_json(folder / "data.json", make_records(9, seed=9))
    write_json(folder / "eval.json", make_records(7, seed=7))
    return folder


# -- Which platforms --------------------------------------------------------------------------------------------------


def test_the_platforms_are_those_of_transformers():
    assert PLATFORMS.keys() == integration_utils.INTEGRATION_TO_CALLBACK.keys()


@pytest.mark.slow
@pytest.mark.parametrize("compat", ["4.37", "5"])
def test_all_means_the_installed_ones(compat: str, monkeypatch: pytest.MonkeyPatch):
    """Against the function of transformers, on every pair of installed modules."""
    modules = "azureml comet_ml dagshub mlflow dvclive neptune tensorboardX wandb codecarbon clearml swanlab trackio"
    names = {"azureml": "azure_ml", "tensorboardX": "tensorboard"}
    code = f"""
import importlib.util as u, itertools, json, os, sys
from transformers.integrations import integration_utils as i
found, find = set(), u.find_spec
u.find_spec = lambda n, *a: True if n.split(".")[0] in found else None
i.is_wandb_available = lambda: "wandb" in found
answers = []
for pair in itertools.combinations({modules.split()!r}, 2):
    found = set(pair)
    i.is_comet_available, i.is_neptune_available = (lambda: "comet_ml" in found), (lambda: "neptune" in found)
    answers.append(i.get_available_reporting_integrations())
print(json.dumps(answers))
"""
    env = reference.environment(compat) | {"TRANSFORMERS_VERBOSITY": "error"}
    theirs = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert theirs.returncode == 0, theirs.stderr
    for pair, expected in zip(itertools.combinations(modules.split(), 2), json.loads(theirs.stdout), strict=True):
        monkeypatch.setattr(platforms, "_found", lambda m, pair=pair: any(name in m for name in pair))
        chosen, named = choose(["all"], compat)
        assert (set(chosen), named) == (set(expected), False), (pair, names)
        assert choose(None, "4.37")[0] == choose(["all"], "4.37")[0]
    assert choose(None, "5") == choose(["none"], "4.37") == ([], True)


def test_nothing_is_reported_unasked(tmp_path: Path):
    """4.37's default is for a command or a file that names 4.37."""
    assert parse_arguments(NEEDED).report_to == ["none"]
    assert parse_arguments([*NEEDED, "--hf_compat", "4.37"]).report_to is None
    (tmp_path / "flags.yaml").write_text("hf_compat: '4.37'")
    assert parse_arguments([*NEEDED, "--config", str(tmp_path / "flags.yaml")]).report_to is None
    assert parse_arguments([*NEEDED, "--report_to", "wandb", "mlflow"]).report_to == ["wandb", "mlflow"]


@pytest.mark.parametrize("words", ["wandbb", "wandb all", "none tensorboard"])
def test_an_unknown_name_is_refused(words: str):
    with pytest.raises(InputError, match=r"--report_to \w+: is no tracker; use azure_ml, comet_ml, .* or all or none"):
        parse_arguments([*NEEDED, "--report_to", *words.split()])


def test_a_missing_client_stops_the_command(folder: Path, tmp_path: Path):
    done = run(train_jax.main, *argv(folder, tmp_path / "out"), "--report_to", "tensorboard", "neptune")
    assert (done.code, done.compiled) == (2, 0)
    assert re.fullmatch(
        r"error: --report_to (tensorboard|neptune): its client is not installed; pip install \w+",
        done.err.splitlines()[-1],
    )


@pytest.mark.parametrize("name", ["neptune", "dagshub", "kubeflow", "clearml", "swanlab"])
def test_a_missing_setting_stops_the_command(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Where the client would ask at the terminal, or fail."""
    monkeypatch.setattr(platforms, "_found", lambda module: True)
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in list(os.environ):
        if variable.startswith((*("NEPTUNE", "MLFLOW", "KUBEFLOW", "CLEARML", "SWANLAB"),)):
            monkeypatch.delenv(variable)
    with pytest.raises(InputError, match=rf"--report_to {name}: .*\b(set|run) \w+"):
        open_trackers([name], "5", {"output_dir": "out"})


def argv(folder: Path, out: Path, *more: Any) -> list[str]:
    """A run of four updates with evaluations and checkpoints."""
    data = ["--data_path", folder / "data.json", "--eval_data_path", folder / "eval.json"]
    return [str(x) for x in ("--model_name_or_path", folder / "model", *data, "--output_dir", out, *FLAGS, *more)]


# Adam's epsilon as in test_live.py: entries of a gradient that are all rounding would decide over whole steps.
FLAGS = """--use_cpu True --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --learning_rate 1e-3
--adam_epsilon 1e-4 --optim adamw_torch --logging_steps 1 --max_steps 4 --seed 3 --eval_strategy steps --eval_steps 2
--save_strategy steps --save_steps 2 --disable_tqdm True""".split()


# -- Events -----------------------------------------------------------------------------------------------------------


class Recorder:
    """Record the events that a callback gets; `fails` is the event that raises, `hangs` that does not return."""

    def __init__(self, fails: str = "", hangs: str = ""):
        self.fails, self.hangs, self.events = fails, hangs, []
        self.logging_dir = None

    def __getattr__(self, event: str) -> Any:
        if not event.startswith("on_"):
            raise AttributeError(event)

        def call(args: Any, state: Any, control: Any, **more: Any) -> None:
            self.events.append((event, state.global_step, more.get("logs"), dict(more)))
            assert threading.current_thread() is not threading.main_thread()
            assert not sys.stdin.isatty() and sys.stdin.read() == ""
            if event == self.fails:
                raise SystemExit("the server\nis away")
            while event == self.hangs:
                time.sleep(0.1)

        return call


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    """In the place of two callbacks."""
    found = {"wandb": Recorder(), "tensorboard": Recorder()}
    monkeypatch.setattr(trackers, "_make_callback", lambda name: found[name])
    return found


@pytest.mark.parametrize("compat", ["4.37", "5"])
def test_events_are_the_trainers(compat: str, folder: Path, tmp_path: Path, recorders: dict[str, Recorder]):
    """The order of the Trainer's events, and in `on_log` the entries of the log before they are rounded for the eye."""
    out = tmp_path / "out"
    done = run(train_jax.main, *argv(folder, out, "--report_to", "wandb", "tensorboard", "--hf_compat", compat))
    assert done.code == 0, done.err
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    log = [({k: v for k, v in entry.items() if k != "step"}, entry["step"]) for entry in log]
    for recorder in recorders.values():
        assert [(logs, step) for event, step, logs, _ in recorder.events if event == "on_log"] == log
        names = [event for event, *_ in recorder.events]
        half = ["on_log", "on_log", "on_log", "on_save"]
        assert names == ["on_init_end", "on_train_begin", *half, *half, "on_log", "on_train_end"]
        model = recorder.events[0][3]["model"]
        assert model.num_parameters() == sum(math.prod(shape) for shape in hf_shapes(CONFIG).values())


EVENTS = ["on_init_end", "on_train_begin", "on_log", "on_save", "on_train_end"]


@pytest.mark.parametrize("event", [slow_unless(event in ("on_init_end", "on_log"), event) for event in EVENTS])
def test_a_tracker_that_fails_is_said_once(event: str, folder: Path, tmp_path: Path, recorders: dict[str, Recorder]):
    recorders["wandb"].fails = event
    done = run(train_jax.main, *argv(folder, tmp_path / "out", "--report_to", "wandb", "tensorboard"))
    assert done.code == 0, done.err
    said = [line for line in done.err.splitlines() if "--report_to" in line]
    assert said == ["--report_to wandb: SystemExit: the server; nothing more is reported there, and training goes on"]
    assert [e for e, *_ in recorders["wandb"].events].count(event) == 1
    assert recorders["wandb"].events[-1][0] == event
    assert recorders["tensorboard"].events[-1][0] == "on_train_end"


def test_a_tracker_that_hangs_does_not_stop_a_run(
    folder: Path, tmp_path: Path, recorders: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trackers, "PATIENCE", 1.0)
    recorders["wandb"].hangs = "on_train_begin"
    done = run(train_jax.main, *argv(folder, tmp_path / "out", "--report_to", "wandb"))
    recorders["wandb"].hangs = ""
    assert done.code == 0 and (tmp_path / "out" / "model.safetensors").exists()
    assert "--report_to wandb: no answer for 1 s; its last reports may be missing" in done.err


def test_a_run_that_fails_passes_on_its_log(recorders: dict[str, Recorder]):
    with pytest.raises(ZeroDivisionError), open_trackers(["wandb"], "5", {"output_dir": "out"}) as reports:
        reports.begin({"global_step": 3, "epoch": 0.5}, lambda: None)
        reports.log({"loss": 1.5, "note": "a text"})
        raise ZeroDivisionError
    assert [event[:3] for event in recorders["wandb"].events][-1] == ("on_log", 3, {"loss": 1.5})


def test_uploads_wait_for_the_checkpoint(recorders: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch):
    events = recorders["wandb"].events
    with open_trackers(["wandb"], "5", {"output_dir": "out"}) as reports:
        reports.begin({"global_step": 3}, lambda: None)
        reports.save(lambda: pytest.fail("nothing takes the checkpoint"))
        monkeypatch.setenv("WANDB_LOG_MODEL", "checkpoint")
        reports.save(lambda: events.append(("written",)))
        names = [event for event, *_ in events]
        assert names.count("on_save") == 2 and names.index("written") < len(names) - 1 and names[-1] == "on_save"


def test_other_processes_report_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from llama_jax.run import reports

    monkeypatch.setattr(reports.processes, "is_first", lambda: False)
    args = parse_arguments([*NEEDED, "--report_to", "neptune"])  # it is not installed here, and need not be
    assert not reports.open_reports(args).trackers.active


def test_the_page_is_true(folder: Path, tmp_path: Path, recorders: dict[str, Recorder]):
    """docs/trackers.md: its command is run, its table has each platform, its extras are in pyproject.toml."""
    page = (ROOT / "docs" / "trackers.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^python train_jax.py ((?:.*\\\n)*.*)$", page, re.M)
    words = shlex.split(command.replace("\\\n", " "))
    paths = {"HF_DIR": folder / "model", "my_data.jsonl": folder / "data.json", "my_model": tmp_path / "out"}
    done = run(train_jax.main, *(paths.get(word, word) for word in words), *FLAGS[:2], "--max_steps", "2")
    assert done.code == 0, done.err
    assert {"wandb", "tensorboard"} <= {*words}
    assert all(recorder.events[-1][0] == "on_train_end" for recorder in recorders.values())
    rows = re.findall(r"^\| (\**)(\w+)\1 \|", page.split("## Platforms")[1], re.M)
    assert {name for _, name in rows} - {"platform"} == PLATFORMS.keys()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name for bold, name in rows if bold} == PLATFORMS.keys() & extras.keys()


# -- What callbacks read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--logging_steps 2 --save_steps 0.5 --eval_strategy steps --warmup_steps 0.1 --run_name r --bf16 True",
        "--eval_strategy epoch --save_strategy epoch --load_best_model_at_end --seed 7 --lr_scheduler_type cosine",
        '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":1e-5} --gradient_checkpointing',
        "--dataloader_num_workers 2 --dataloader_prefetch_factor 2 --ddp_timeout 6 --project p --hub_private_repo True",
        "--include_num_input_tokens_seen --train_sampling_strategy group_by_length --data_seed 3 --max_grad_norm 0",
    ],
)
def test_arguments_are_the_trainers(words: str):
    """All that `to_dict`, `to_json_string` and `to_sanitized_dict` give, against the real TrainingArguments."""
    from transformers import HfArgumentParser, TrainingArguments

    given = ["--output_dir", "out", "--use_cpu", "True", "--disable_tqdm", "True", "--optim", "adamw_torch"]
    given += ["--report_to", "wandb", *words.split()]
    (theirs,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(given)
    ours = trainer_arguments(
        parse_arguments([*NEEDED, "--eval_data_path", "e.json", "--hf_compat", "5", *given]).of_trainer
    )
    assert ours.to_dict() == theirs.to_dict()
    assert ours.to_json_string() == theirs.to_json_string()
    assert ours.to_sanitized_dict() == theirs.to_sanitized_dict()
    assert [f.name for f in dataclasses.fields(ours)] == [f.name for f in dataclasses.fields(theirs)]


# -- The real clients, against the real Trainer -----------------------------------------------------------------------

# How each client is kept on this machine.
LOCAL = {
    "wandb": {"WANDB_MODE": "offline", "WANDB_PROJECT": "fish", "WANDB_SILENT": "true"},
    "trackio": {"TRACKIO_DIR": "trackio"},
    "mlflow": {"MLFLOW_TRACKING_URI": "sqlite:///me/mlflow.db", "MLFLOW_EXPERIMENT_NAME": "fish"},
    "dagshub": {"MLFLOW_TRACKING_URI": "sqlite:///me/mlflow.db", "DAGSHUB_USER_TOKEN": "word"},
    "comet_ml": {"COMET_START_ONLINE": "0", "COMET_PROJECT_NAME": "fish"},
    "clearml": {"CLEARML_OFFLINE_MODE": "1", "CLEARML_LOG_MODEL": "FALSE", "CLEARML_CACHE_DIR": "clearml"},
    "swanlab": {"SWANLAB_MODE": "offline", "SWANLAB_PROJECT": "fish"},
    "codecarbon": {"CODECARBON_LOG_LEVEL": "error"},
}
FILE = {"azure_ml": "azureml.core", "tensorboard": "tensorboardX"}
QUICKER = "sdk { development { detect_with_pip_freeze: true } }"  # else clearml reads all files for their imports


def installed(name: str) -> bool:
    """Whether a process with the folder of clients on its path finds the client."""
    module = FILE.get(name, name).partition(".")[0]
    return (CLIENTS / module).exists() or importlib.util.find_spec(module) is not None


def both(folder: Path, at: Path, names: list[str], compat: str, more: list[str]) -> Iterator[Path]:
    """Run the command and the Trainer, each in a process and folder of its own, and yield the folders."""
    env = {k: v for name in names for k, v in LOCAL.get(name, {}).items()}
    env |= {"HOME": str(at), "CLEARML_CONFIG_FILE": str(at / "clearml.conf"), "HF_HUB_OFFLINE": "1"}
    env |= {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    (at / "clearml.conf").write_text(QUICKER)
    flags = [*FLAGS, *more]
    spec = {"argv": spelled(compat, flags), "report_to": names, "output_dir": "out", "model": str(folder / "model")}
    spec |= {"data": str(folder / "data.json"), "eval_data": str(folder / "eval.json")}
    ours = [sys.executable, str(ROOT / "train_jax.py"), *argv(folder, Path("out"), *more, "--hf_compat", compat)]
    ours += ["--report_to", *names]
    for side, command, text, process in (
        ("ours", ours, "", environment() | {"PYTHONPATH": os.pathsep.join(paths())}),
        ("hf", [sys.executable, str(ROOT / "tests" / "hf_trainer.py")], json.dumps(spec) + "\n",
         reference.environment(compat, *map(Path, paths()))),
    ):  # fmt: skip
        (at / side / "me").mkdir(parents=True)  # of DagsHub's user, in the store's path
        done = subprocess.run(command, cwd=at / side, env=process | env, input=text, capture_output=True, text=True)
        assert done.returncode == 0 and '"error"' not in done.stdout, (done.stdout, done.stderr[-3000:])
        assert "--report_to" not in done.stderr, done.stderr
        (at / side / "stdout").write_text(done.stdout if side == "ours" else done.stdout + done.stderr)
        yield at / side


def paths() -> list[str]:
    """Where modules are found in processes that have the clients."""
    return [str(ROOT), str(CLIENTS), *filter(None, [os.environ.get("PYTHONPATH")])]


def read(names: list[str], at: Path) -> list[Written]:
    """Read what each client wrote, in a process that has them."""
    command = [sys.executable, str(ROOT / "tests" / "tracker_files.py"), str(at), *names]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths())}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = [json.loads(line) for line in done.stdout.splitlines()[-len(names) :]]
    return [
        Written({(key, step): value for key, step, value in values}, settings, run_name)
        for values, settings, run_name in written
    ]


def spelled(compat: str, flags: list[str]) -> list[str]:
    """The flags in the version's own words."""
    return ["--evaluation_strategy" if f == "--eval_strategy" and compat == "4.37" else f for f in flags]


def same(name: str, ours: Written, theirs: Written, compat: str) -> None:
    """Compare keys, steps and values: losses and norms as in test_live.py, float32 where the platform keeps that."""
    assert list(ours.values) == list(theirs.values) or set(ours.values) == set(theirs.values)
    assert len(ours.values) >= 20
    for (key, step), value in theirs.values.items():
        if CLOCK.search(key):
            assert np.isfinite(ours.values[key, step])
            continue
        digit = 1e-4 * (1 + 1e-6) if compat == "4.37" and key.endswith("loss") else 1e-12
        bound = 1e-4 if key.endswith("grad_norm") else 1e-5
        np.testing.assert_allclose(
            ours.values[key, step], value, rtol=bound, atol=digit, err_msg=f"{name} {key} {step}"
        )
    assert ours.settings == theirs.settings
    if name not in ("mlflow", "dagshub", "swanlab"):  # they draw a name where none is given
        assert ours.name == theirs.name


LIGHT = ["tensorboard", "wandb", "trackio"]
# In CI, the light clients together, under both versions' rules; of the others, those that are installed.
CASES = [
    pytest.param("5", LIGHT, ["--run_name", "cod", "--project", "fish"], id="5, light", marks=pytest.mark.slow),
    pytest.param("4.37", ["tensorboard"], ["--logging_dir", "board"], id="4.37", marks=pytest.mark.slow),
    *(
        pytest.param("5", [name], [], id=name, marks=pytest.mark.slow)
        for name in ("mlflow", "dagshub", "dvclive", "comet_ml", "clearml", "codecarbon", "swanlab", "azure_ml")
    ),
]


@pytest.mark.parametrize(("compat", "names", "more"), CASES)
def test_clients_get_what_the_trainer_gives(
    compat: str, names: list[str], more: list[str], folder: Path, tmp_path: Path
):
    for name in names:
        if not installed(name):
            pytest.skip(f"{name}: pip install {PLATFORMS[name].package}")
    ours, theirs = both(folder, tmp_path, names, compat, more)
    for name, *written in zip(names, read(names, ours), read(names, theirs), strict=True):
        if compat == "4.37":  # the args are those of 5
            written = [w._replace(settings={}) for w in written]
            assert (ours / "board").is_dir()
        same(name, *written, compat)
        if name in ("wandb", "trackio"):
            assert written[0].name == "cod"
        if name == "trackio":
            assert written[0].settings["project"] == "fish"


# -- Platforms that keep nothing on this machine: their client's calls, against those of the real Trainer -------------


class Neptune:
    """Stand in for the client's run: record what is assigned and logged, by path."""

    def __init__(self, calls: list[Any], path: str = ""):
        self._calls, self._path = calls, path

    def __getitem__(self, path: str) -> "Neptune":
        return Neptune(self._calls, f"{self._path}/{path}".lstrip("/"))

    def __setitem__(self, path: str, value: Any) -> None:
        self._calls.append(("set", f"{self._path}/{path}".lstrip("/"), value))

    def log(self, value: float, step: int) -> None:
        self._calls.append(("log", self._path, step, value))

    def fetch(self) -> str:
        return "RUN-1"

    def stop(self) -> None:
        self._calls.append(("stop",))


def module(name: str, **contents: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__spec__ = importlib.util.spec_from_loader(name, loader=None)
    vars(made).update(contents)
    return made


def stand_in(name: str, calls: list[Any], patch: pytest.MonkeyPatch) -> None:
    """Put modules that record calls in the place of a client."""

    def note(what: str, result: Any = None) -> Any:
        return lambda *a, **k: (calls.append((what, *a, *sorted(k.items()))), result)[1]

    def of(path: str, **contents: Any) -> None:
        patch.setitem(sys.modules, path, module(path, **contents))

    if name == "neptune":
        patch.setattr(integration_utils, "is_neptune_available", lambda: True)
        patch.setenv("NEPTUNE_API_TOKEN", "token")
        patch.setenv("NEPTUNE_PROJECT", "me/fish")
        of("neptune", Run=Neptune, init_run=note("init_run", Neptune(calls)))
        of("neptune.internal.utils", verify_type=lambda *_: None)
        of("neptune.internal")
        of("neptune.exceptions", NeptuneMissingApiTokenException=KeyError, NeptuneMissingProjectNameException=KeyError)
        of("neptune.utils", stringify_unsupported=lambda value: value)
    if name == "flyte":
        context = types.SimpleNamespace(checkpoint=types.SimpleNamespace(save=note("save")))
        table = types.SimpleNamespace(to_html=lambda frame: frame.to_dict("records"))
        of("flytekit", current_context=lambda: context, Deck=note("deck"))
        of("flytekitplugins")
        of("flytekitplugins.deck")
        of("flytekitplugins.deck.renderer", TableRenderer=lambda: table)


@pytest.fixture
def kubeflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A server as the one of a TrainJob; the callback posts each update, not one in five seconds."""
    posts: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["trainerStatus"]
            assert self.headers["Authorization"] == "Bearer word"
            posts.append({key: value for key, value in body.items() if key == "progressPercentage"})
            posts[-1] |= {m["name"]: float(m["value"]) for m in body["metrics"]}
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "token").write_text("word\n")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(tmp_path / "token"))
    monkeypatch.setattr(integration_utils.KubeflowCallback, "_MIN_UPDATE_INTERVAL", 0.0)
    yield posts
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["neptune", "flyte", "kubeflow"])
def test_clients_calls_are_the_trainers(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    calls: list[Any] = request.getfixturevalue("kubeflow") if name == "kubeflow" else []
    stand_in(name, calls, monkeypatch)
    monkeypatch.chdir(tmp_path)
    done = run(train_jax.main, *argv(folder, "out", "--report_to", name, "--hf_compat", "5"))
    assert done.code == 0 and f"--report_to {name}" not in done.err, done.err
    ours = calls.copy()
    calls.clear()
    spec = {"argv": FLAGS, "report_to": [name], "output_dir": "out", "model": str(folder / "model")}
    spec |= {"data": str(folder / "data.json"), "eval_data": str(folder / "eval.json")}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    theirs = hf_trainer.train(spec)
    assert "error" not in theirs, theirs
    assert len(calls) >= {"neptune": 30, "flyte": 3, "kubeflow": 6}[name]
    assert rounded(ours) == rounded(calls)


def rounded(value: Any) -> Any:
    """Return nested values without those of the clock and to the digits that both sides share, see `same`."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items() if not CLOCK.search(str(key))}
    if isinstance(value, (list, tuple)):
        if len(value) == 4 and CLOCK.search(str(value[1])):
            return [*value[:3], "seconds"]
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.3g}")
    return value


@pytest.mark.slow
def test_two_processes_that_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first process alone reports; after SIGTERM to the other, its reports end with the last update's line."""
    if not installed("tensorboard"):
        pytest.skip("tensorboardX is not installed; `make test` installs it")
    from test_processes import finish, start

    job = Job(tmp_path, hf_compat="5", per_device_train_batch_size=1, max_steps=200, save_steps=1000, logging_steps=1)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths()))
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    processes = start([job.argv("out", report_to="tensorboard")] * 2, 1)
    while processes[0].out.count("'loss'") < 3:
        assert processes[0].poll() is None
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, code=143)
    state = json.loads((tmp_path / "out" / "report.json").read_text())["log_history"]
    assert (tmp_path / "out" / f"checkpoint-{state[-1]['step']}").is_dir() and state[-1]["step"] >= 3
    (board,) = read(["tensorboard"], tmp_path)
    written = board.values
    losses = {step: value for (key, step), value in written.items() if key == "train/loss"}
    assert losses == pytest.approx({e["step"]: e["loss"] for e in state if "loss" in e}, rel=1e-6)
    assert len([*(tmp_path / "out" / "runs").glob("*")]) == 1
