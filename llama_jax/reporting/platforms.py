"""List the platforms of `--report_to`: the client of each, the settings it needs, and whether it takes checkpoints."""

import importlib.util
import netrc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

from llama_jax.base.errors import InputError

_TRUE = {"1", "ON", "YES", "TRUE", "Y"}
NONE, ALL = "none", "all"


class Platform(NamedTuple):
    """Describe a platform.

    `package` is what pip installs. `in_all` lists the versions of transformers whose `all` includes the platform.
    `missing` returns the advice of a setting without which the client would fail or ask, else "". `uploads` returns
    whether the callback takes the files of a checkpoint.
    """

    modules: Sequence[str]
    package: str
    in_all: Sequence[str] = ("4.37", "5")
    missing: Callable[[], str] = lambda: ""
    uploads: Callable[[], bool] = lambda: False

    @property
    def installed(self) -> bool:
        """Return whether the client's modules are found."""
        return all(map(_found, self.modules))


def choose(report_to: Sequence[str] | None, compat: str) -> tuple[list[str], bool]:
    """Return the platforms to report to, and whether they are named; 4.37's default `all` takes the installed ones."""
    names = list(report_to) if report_to is not None else [ALL if compat == "4.37" else NONE]
    if compat == "5" and report_to is None and _in_kubeflow():  # as 5 adds it
        return ["kubeflow"], True
    if names == [ALL]:
        installed = [name for name, platform in PLATFORMS.items() if compat in platform.in_all and platform.installed]
        if "mlflow" in installed and "azure_ml" in installed:  # whose MLflow server receives the same
            installed.remove("azure_ml")
        return installed, False
    if names in ([NONE], ["None"]):
        return [], True
    return list(dict.fromkeys(names)), True


def check_names(report_to: Sequence[str]) -> None:
    """Raise InputError for a name that is no platform's, and for `all` or `none` beside another."""
    for name in report_to:
        if name not in PLATFORMS and (len(report_to) > 1 or name not in (ALL, NONE, "None")):
            alone = " alone" if len(report_to) > 1 else ""
            raise InputError(f"--report_to {name}: is no tracker; use {', '.join(PLATFORMS)}, or all or none{alone}")


def _found(module: str) -> bool:
    """Return whether a module is installed, without its import; `a|b` is either."""
    if "|" in module:
        return any(map(_found, module.split("|")))
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # no parent; a module without a spec
        return False


def _set(name: str, default: str = "") -> bool:
    return os.environ.get(name, default).upper() in _TRUE


def _in_kubeflow() -> bool:
    return "KUBEFLOW_TRAINER_SERVER_URL" in os.environ and not _set("DISABLE_KUBEFLOW_INTEGRATION")


def _missing_of_wandb() -> str:
    import wandb

    settings = wandb.setup().settings
    keys = ("_offline", "_noop", "api_key", "identity_token_file")
    if any(getattr(settings, key, None) for key in keys) or _in_netrc("~/.netrc", settings.base_url):
        return ""
    return "there is no login; run wandb login, or set WANDB_MODE=offline"


def _in_netrc(path: str, url: str) -> bool:
    """Return whether a netrc file has the password of a server."""
    try:
        hosts = netrc.netrc(os.environ.get("NETRC") or os.path.expanduser(path)).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return urlparse(url).hostname in hosts


def _missing_of_comet() -> str:
    from comet_ml.config import get_config

    if get_config("comet.api_key") or get_config("comet.start.online") is False:
        return ""
    return "there is no key; set COMET_API_KEY, or COMET_START_ONLINE=0 for a run offline"


def _missing_of_clearml() -> str:
    config = os.environ.get("CLEARML_CONFIG_FILE") or "~/clearml.conf"
    if _set("CLEARML_OFFLINE_MODE") or "CLEARML_API_ACCESS_KEY" in os.environ or "CLEARML_AUTH_TOKEN" in os.environ:
        return ""
    exists = Path(config).expanduser().exists()
    return "" if exists else "there is no clearml.conf; run clearml-init, or set CLEARML_OFFLINE_MODE=1"


def _missing_of_neptune() -> str:
    if os.environ.get("NEPTUNE_MODE") == "debug" or {"NEPTUNE_API_TOKEN", "NEPTUNE_PROJECT"} <= os.environ.keys():
        return ""
    return "set NEPTUNE_API_TOKEN and NEPTUNE_PROJECT"


def _missing_of_dagshub() -> str:
    return "" if "MLFLOW_TRACKING_URI" in os.environ else "set MLFLOW_TRACKING_URI to the repository's"


def _missing_of_swanlab() -> str:
    local = os.environ.get("SWANLAB_MODE") in ("local", "offline", "disabled")
    if local or "SWANLAB_API_KEY" in os.environ or Path("~/.swanlab/.netrc").expanduser().exists():
        return ""
    return "there is no login; run swanlab login, or set SWANLAB_MODE=local"


def _missing_of_kubeflow() -> str:
    return "" if _in_kubeflow() else "set KUBEFLOW_TRAINER_SERVER_URL, as a TrainJob does"


# In the order of transformers, in which their callbacks are called.
PLATFORMS: dict[str, Platform] = {
    "azure_ml": Platform(["azureml.core.run"], "azureml-core"),
    "comet_ml": Platform(["comet_ml"], "'comet_ml>=3.43.2'", missing=_missing_of_comet),
    "dagshub": Platform(
        ["dagshub", "mlflow"],
        "dagshub mlflow",
        missing=_missing_of_dagshub,
        uploads=lambda: _set("HF_MLFLOW_LOG_ARTIFACTS"),
    ),
    "dvclive": Platform(
        ["dvclive"], "dvclive", uploads=lambda: os.environ.get("HF_DVCLIVE_LOG_MODEL", "").lower() == "all"
    ),
    "mlflow": Platform(["mlflow"], "mlflow", uploads=lambda: _set("HF_MLFLOW_LOG_ARTIFACTS")),
    "neptune": Platform(["neptune"], "neptune", missing=_missing_of_neptune),
    # Without torch, the callback writes by tensorboardX.
    "tensorboard": Platform(["tensorboardX|tensorboard", "tensorboardX|torch"], "tensorboardX"),
    "wandb": Platform(
        ["wandb"],
        "wandb",
        missing=_missing_of_wandb,
        uploads=lambda: os.environ.get("WANDB_LOG_MODEL", "").lower() == "checkpoint",
    ),
    "codecarbon": Platform(["codecarbon"], "codecarbon"),
    "clearml": Platform(
        ["clearml"], "clearml", missing=_missing_of_clearml, uploads=lambda: _set("CLEARML_LOG_MODEL", "TRUE")
    ),
    # The callback of transformers 5.24 expects None of swanlab.get_run() before a run; from 0.8 on, it raises.
    "swanlab": Platform(["swanlab"], "'swanlab<0.8'", in_all=("5",), missing=_missing_of_swanlab),
    "trackio": Platform(["trackio"], "trackio", in_all=("5",)),
    "flyte": Platform(
        ["flytekit", "flytekitplugins.deck"], "flytekit flytekitplugins-deck-standard", in_all=(), uploads=lambda: True
    ),
    "kubeflow": Platform([], "", in_all=(), missing=_missing_of_kubeflow),
}
