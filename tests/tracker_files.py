"""Read what clients of trackers wrote in their offline or local mode: values by key and step, and settings by name.

As a script, print it in JSON: two readers need modules of the clients, which no other test should find.
"""

import csv
import json
import re
import sqlite3
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Written(NamedTuple):
    """Hold the values of a run by key and step (None where the platform keeps none), its settings, and its name."""

    values: dict[tuple[str, Any], float]
    settings: dict[str, Any]
    name: str | None = None


def the(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def tensorboard(folder: Path) -> Written:
    """The event file: records of a length, its checksum, an event, and a checksum."""
    from tensorboardX.proto.event_pb2 import Event

    path, values, settings = the(folder, "**/events.out.tfevents.*"), {}, {}
    data, at = path.read_bytes(), 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + size])
        at += size + 16
        for value in event.summary.value:
            if value.HasField("simple_value"):
                values[value.tag, event.step] = value.simple_value
            else:
                settings |= flat(json.loads(value.tensor.string_val[0]), value.tag.partition("/")[0])
    return Written(values, settings)


def wandb(folder: Path) -> Written:
    """The file of a run offline: LevelDB's log, whose blocks of 32 KiB hold pieces of records."""
    from wandb.proto.wandb_internal_pb2 import Record

    values, settings, name, record = {}, {}, None, b""
    data, at = the(folder, "wandb/offline-run-*/*.wandb").read_bytes(), 7  # after the file's head
    while at + 7 <= len(data):
        _, size, kind = struct.unpack_from("<IHB", data, at)
        if not kind:  # a block's rest
            at += 32768 - at % 32768
            continue
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        if kind not in (1, 4):  # a whole record, or the last of its pieces
            continue
        parsed, record = Record.FromString(record), b""
        if (kind := parsed.WhichOneof("record_type")) == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in parsed.history.item}
            step = row.pop("train/global_step")
            values |= {(key, step): value for key, value in row.items() if not key.startswith("_")}
        elif kind == "summary":
            rows = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in parsed.summary.update
            }
            values |= {(f"summary {key}", None): v for key, v in rows.items() if not key.startswith("_")}
        elif kind in ("run", "config"):
            config = parsed.run.config if kind == "run" else parsed.config
            settings |= {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in config.update}
            name = parsed.run.display_name or name if kind == "run" else name
    settings = flat({key: value for key, value in settings.items() if not key.startswith("_wandb")})
    return Written({key: v for key, v in values.items() if isinstance(v, (int, float))}, settings, name)


def trackio(folder: Path) -> Written:
    """The database of a project."""
    path = next(p for p in (folder / "trackio").glob("*.db"))
    with sqlite3.connect(path) as base:
        values = {}
        for (text,) in base.execute("select metrics from metrics order by id"):
            row = json.loads(text)
            step = row.pop("train/global_step")
            values |= {(key, step): value for key, value in row.items()}
        ((name, config),) = base.execute("select run_name, config from configs").fetchall()
    settings = {key: value for key, value in json.loads(config).items() if key not in ("_Username", "_Created")}
    return Written(values, {**flat(settings), "project": path.stem}, name)


def mlflow(folder: Path) -> Written:
    """The tables of an SQLite store."""
    with sqlite3.connect(folder / "me" / "mlflow.db") as base:
        values = {(key, step): value for key, step, value in base.execute("select key, step, value from metrics")}
        settings = dict(base.execute("select key, value from params").fetchall())
        ((name, status, experiment),) = base.execute(
            "select runs.name, status, experiments.name from runs join experiments using (experiment_id)"
        ).fetchall()
    return Written(values, {**settings, "status": status, "experiment": experiment}, name)


def dvclive(folder: Path) -> Written:
    """Tables of metrics, which count calls, and parameters."""
    import yaml

    values = {}
    root = folder / "dvclive"
    for path in (root / "plots" / "metrics").rglob("*.tsv"):
        key = path.relative_to(root / "plots" / "metrics").with_suffix("").as_posix()
        for row in csv.DictReader(path.open(), delimiter="\t"):
            values[key, int(row["step"])] = float(row[path.stem])
    return Written(values, flat(yaml.safe_load((root / "params.yaml").read_text())))


def comet_ml(folder: Path) -> Written:
    """The messages in the archive of an experiment offline, without those of the machine and the command line."""
    values, settings = {}, {}
    with zipfile.ZipFile(the(folder, ".cometml-runs/*.zip")) as archive:
        lines = archive.read("messages.json").decode().splitlines()
    for payload in (json.loads(line)["payload"] for line in lines):
        if (metric := payload.get("metric")) and not metric["metricName"].startswith("sys."):
            values[metric["metricName"], metric["step"]] = float(metric["metricValue"])
        if (param := payload.get("param")) and param["source"] == "manual":
            settings[param["paramName"]] = param.get("paramValue", param.get("paramValues"))
    return Written(values, settings)


def clearml(folder: Path) -> Written:
    """The session of a task offline."""
    values: dict[tuple[str, Any], float] = {}
    with zipfile.ZipFile(the(folder, "clearml/**/offline-*.zip")) as archive:
        task = json.loads(archive.read("task.json"))
        for line in archive.read("metrics.jsonl").decode().splitlines():
            for event in json.loads(line):
                if not event["metric"].startswith(":monitor"):  # of the machine
                    values[f"{event['metric']}/{event['variant']}", event["iter"]] = event["value"]
    settings = {}
    for section, pairs in task["hyperparams"].items():
        if section == "TF_DEFINE":  # absl's flags, of orbax
            continue
        settings |= {f"{section}/{name}": pair["value"] for name, pair in pairs.items()}
    settings |= {section: config["value"] for section, config in task["configuration"].items()}
    return Written(values, settings, f"{task.get('project', '')}/{task['name']}")


def swanlab(folder: Path) -> Written:
    """The backup of a run offline, whose records are JSON between heads of a few bytes."""
    import yaml

    values, name = {}, None
    (run,) = folder.glob("swanlog/run-*")
    for text in re.findall(rb'{"model_type": .*?}(?=[^ ,}\]"]|$)', (run / "backup.swanlab").read_bytes(), re.S):
        record = json.loads(text)
        data = record["data"]
        if record["model_type"] == "Scalar":
            values[data["key"], data["step"]] = data["metric"]["data"]
        elif record["model_type"] == "Experiment":
            name = data["name"]
    config = yaml.safe_load((run / "files" / "config.yaml").read_text())
    return Written(values, flat({key: entry["value"] for key, entry in config.items()}), name)


def codecarbon(folder: Path) -> Written:
    """The table of emissions: its columns, and the run's row of them. All its figures are of time or machine."""
    (row,) = csv.DictReader((folder / "out" / "emissions.csv").open())
    return Written(dict.fromkeys(((key, None) for key in row), 0.0), {"project_name": row["project_name"]})


def azure_ml(folder: Path) -> Written:
    """The lines that a run outside of Azure prints of each metric, by their numbers; of the Trainer, whose output is
    caught, the entries that it passes on."""
    found = re.findall(r"Attempted to log scalar metric (\w+):\n(\S+)", (folder / "stdout").read_text())
    if not found:
        log = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
        found = [(key, value) for entry in log for key, value in entry.items() if key != "step"]
    numbers = Counter[str]()
    values = {}
    for key, value in found:
        numbers[key] += 1
        values[key, numbers[key]] = float(value)
    return Written(values, {})


_ALL = (tensorboard, wandb, trackio, mlflow, dvclive, comet_ml, clearml, swanlab, codecarbon, azure_ml)
READERS: dict[str, Callable[[Path], Written]] = {f.__name__: f for f in _ALL}
READERS["dagshub"] = mlflow  # its callback is MLflow's, with an upload of artefacts


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings by the paths of their names."""

    def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from walk(inner, f"{path}/{key}" if path else str(key))
        else:
            yield path, value

    return dict(walk(settings, prefix))


if __name__ == "__main__":
    _, at, *names = sys.argv
    lines = []
    for found in [READERS[name](Path(at)) for name in names]:
        values = [[key, step, value] for (key, step), value in found.values.items()]
        lines.append(json.dumps([values, found.settings, found.name]))
    print("\n".join(lines))
