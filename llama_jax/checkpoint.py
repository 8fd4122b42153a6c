"""Orbax, behind one thin room: the run's retained steps, and a Flax folder's parameters."""

import re
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from llama_jax.errors import InputError

PARAMS_DIR = "params"  # of a Flax folder
_STEP = re.compile(r"checkpoint-(0|[1-9]\d*)")
# Bytes that a save may hold in host memory beyond the arrays' own.
_CONCURRENT_GB = 4


class _HFNames(ocp.path.step.NameFormat):
    """`checkpoint-N`, as the HF Trainer names its steps."""

    def build_name(self, step: int) -> str:
        return f"checkpoint-{step}"

    def find_all(self, base_path):
        for path in epath.Path(base_path).iterdir():
            if (match := _STEP.fullmatch(path.name)) and ocp.path.step.is_path_finalized(path):
                yield ocp.path.step.Metadata(step=int(match[1]), path=path)

    def find_step(self, base_path, step: int):
        for found in self.find_all(base_path):
            if found.step == step:
                return found
        raise ValueError(f"no checkpoint-{step} in {base_path}")


def find_steps(output_dir: Path) -> list[int]:
    """The whole checkpoints in a folder, oldest first."""
    return sorted(m.step for m in _HFNames().find_all(output_dir)) if output_dir.is_dir() else []


class Checkpoints:
    """The `checkpoint-N` folders of a run, at most `limit` of them (None: all)."""

    def __init__(self, output_dir: Path, limit: int | None):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=limit if limit and limit > 0 else None,
            step_name_format=_HFNames(),
            cleanup_tmp_directories=True,
        )
        handlers = {"state": _handler(), "run": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(output_dir.absolute(), options=options, item_handlers=handlers)

    def save(self, step: int, state: Any, run: dict[str, Any]) -> None:
        """Start to write `state` (a pytree of arrays) and `run` (JSON) as `checkpoint-<step>`; it may be donated after."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        self._manager.save(step, args=args, force=True)

    def restore_run(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]

    def restore_state(self, step: int, abstract: Any) -> Any:
        """The state of a step into the types and placements of `abstract` (a pytree of ShapeDtypeStruct)."""
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            return self._manager.restore(step, args=args)["state"]
        except (ValueError, KeyError, FileNotFoundError) as e:
            raise InputError(
                f"checkpoint-{step} of {self._manager.directory} cannot be restored for this model and optimizer: "
                f"{str(e).splitlines()[0][:200]}"
            ) from None

    def wait(self) -> None:
        """Until everything is on disk. Raises what went wrong."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def _handler() -> ocp.StandardCheckpointHandler:
    return ocp.StandardCheckpointHandler(save_concurrent_gb=_CONCURRENT_GB, restore_concurrent_gb=_CONCURRENT_GB)


def save_params(folder: Path, params: Any) -> None:
    """Write unstacked parameters as the `params` of a Flax folder."""
    with ocp.Checkpointer(_handler()) as checkpointer:
        checkpointer.save(folder.absolute() / PARAMS_DIR, args=ocp.args.StandardSave(params), force=True)


def load_params(folder: Path, abstract: Any) -> Any:
    """Read the `params` of a Flax folder into the types and placements of `abstract`."""
    try:
        with ocp.Checkpointer(_handler()) as checkpointer:
            return checkpointer.restore(folder.absolute() / PARAMS_DIR, args=ocp.args.StandardRestore(abstract))
    except (ValueError, KeyError, FileNotFoundError) as e:
        reason = str(e).splitlines()[0][:200]
        raise InputError(f"{folder / PARAMS_DIR}: does not hold the parameters of its config.json: {reason}") from None


def abstract_like(tree: Any) -> Any:
    """The types and placements of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
