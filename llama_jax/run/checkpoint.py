"""Orbax, behind one thin room: the run's retained steps, and a Flax folder's parameters."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.errors import JaxRuntimeError

from llama_jax.base.errors import InputError
from llama_jax.distributed.storage import handler, restore_args, tree_bytes
from llama_jax.setup.job import kept_steps

_STEP = re.compile(r"checkpoint-(0|[1-9]\d*)")
_ORBAX = ("_CHECKPOINT_METADATA", "commit_success.txt")  # the files beside the folders of a checkpoint


class _HFNames(ocp.path.step.NameFormat):
    """`checkpoint-N`, as the HF Trainer names its steps."""

    def build_name(self, step: int) -> str:
        return f"checkpoint-{step}"

    def find_all(self, base_path):
        for path in epath.Path(base_path).iterdir():
            whole = all((path / item).is_dir() for item in ("state", "run"))  # the HF Trainer's have neither
            if whole and (match := _STEP.fullmatch(path.name)) and ocp.path.step.is_path_finalized(path):
                yield ocp.path.step.Metadata(step=int(match[1]), path=path)

    def find_step(self, base_path, step: int):
        for found in self.find_all(base_path):
            if found.step == step:
                return found
        raise ValueError(f"no checkpoint-{step} in {base_path}")


def find_steps(output_dir: Path) -> list[int]:
    """The whole checkpoints in a folder, oldest first."""
    return sorted(m.step for m in _HFNames().find_all(output_dir)) if output_dir.is_dir() else []


def find_foreign(output_dir: Path) -> list[str]:
    """What is named like a checkpoint in a folder and has files that ours have not, as those of the HF Trainer."""
    return sorted(p.name for p in _named(output_dir) if any(f.is_file() and f.name not in _ORBAX for f in p.iterdir()))


def _named(output_dir: Path) -> list[Path]:
    """The folders named like checkpoints."""
    return [path for path in output_dir.iterdir() if _STEP.fullmatch(path.name)] if output_dir.is_dir() else []


def _remove_remnants(output_dir: Path) -> None:
    """What is left of checkpoints whose removal was cut short."""
    whole = find_steps(output_dir)
    for path in _named(output_dir):
        if int(path.name.removeprefix("checkpoint-")) not in whole:
            shutil.rmtree(path)


def remove_steps(output_dir: Path) -> None:
    for step in find_steps(output_dir):
        shutil.rmtree(output_dir / _HFNames().build_name(step))


def read_run(output_dir: Path, step: int) -> dict[str, Any]:
    """The JSON that was saved beside the state of a step. Raises InputError."""
    with _restoring(output_dir, step), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(output_dir.absolute() / _HFNames().build_name(step) / "run")


@contextlib.contextmanager
def _restoring(output_dir: Path, step: int, besides: str = "") -> Iterator[None]:
    """Whatever goes wrong is a damaged checkpoint, unless memory is short: orbax and tensorstore raise all kinds of
    exceptions."""
    try:
        yield
    except (JaxRuntimeError, MemoryError):
        raise
    except Exception as e:
        older = [s for s in find_steps(output_dir) if s < step]
        mend = f"--resume_from_checkpoint {output_dir}/checkpoint-{older[-1]}" if older else "start anew"
        why = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise InputError(
            f"{output_dir}/checkpoint-{step}: is damaged{besides}; move it away and {mend}: {why}"
        ) from None


@jax.jit
def _digest(x: jax.Array) -> jax.Array:
    """A sum of an array's bits, each element's times an odd number by its place: one wrong bit changes it for sure.
    Zeros that pad the array do not, nor how it is divided over devices."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    for axis, odd in enumerate(np.asarray([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D], np.uint32)[: x.ndim]):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=jax.typeof(bits).sharding)
        bits = bits * (2 * place * odd + 1)
    return bits.sum(dtype=jnp.uint32)


def digests(state: Any) -> dict[str, int]:
    """`_digest` of each array of a tree, by its path."""
    # One at a time, see sharding.IN_FLIGHT.
    return {jax.tree_util.keystr(path): int(_digest(x)) for path, x in jax.tree_util.tree_leaves_with_path(state)}


class Checkpoints:
    """The `checkpoint-N` folders of a run, at most `limit` of them (None or 0: all), for states like `abstract`.

    The run goes on from `first`: checkpoints past it, of a run that was gone back on, are removed once there is a new
    one to write. A state that fits this host's memory twice is copied there and written while the run goes on; a larger
    one is written piece by piece, and the run waits.
    """

    def __init__(self, output_dir: Path, limit: int | None, abstract: Any, first: int):
        self._rotation = _Rotation(limit)
        if jax.process_index() == 0:
            _remove_remnants(output_dir)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._rotation,
            step_name_format=_HFNames(),
            cleanup_tmp_directories=True,
        )
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._piecewise = tree_bytes(abstract) > memory // 2
        handlers = {"state": handler(abstract, self._piecewise), "run": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(output_dir.absolute(), options=options, item_handlers=handlers)
        self._past = [step for step in self._manager.all_steps() if step > first]

    def save(self, step: int, state: Any, run: dict[str, Any], best: int | None = None) -> None:
        """Write `state` (a pytree of arrays) and `run` (JSON) as `checkpoint-<step>`; the state may then be donated.

        The checkpoint of step `best` is not rotated away.
        """
        self._rotation.best = best
        while self._past:
            self._manager.delete(self._past.pop())
        run = ocp.args.JsonSave({**run, "digests": digests(state)})
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), run=run)
        self._manager.save(step, args=args, force=True)
        if self._piecewise:
            self.wait()

    def restore_state(self, step: int, abstract: Any) -> Any:
        """The state of a step into the types and placements of `abstract` (a pytree of ShapeDtypeStruct).

        The model has to be that of the checkpoint: where a leaf is longer or shorter there, that is taken for what
        another mesh pads. Raises InputError.
        """
        folder = Path(self._manager.directory)
        with _restoring(folder, step, ", or of another model or optimizer"):
            state = self._manager.restore(step, args=ocp.args.Composite(state=restore_args(abstract)))["state"]
        saved = read_run(folder, step).get("digests", {})  # checkpoints of before 2026-11-27 have none
        with _restoring(folder, step):
            wrong = [path for path, digest in digests(state).items() if saved and saved[path] != digest]
            if wrong:
                raise ValueError(f"{len(wrong)} of {len(saved)} arrays are not what was saved, {wrong[0]} first")
        return state

    def keep_only(self, step: int) -> None:
        """Remove all checkpoints but one."""
        self.wait()
        for other in self._manager.all_steps():
            if other != step:
                self._manager.delete(other)

    def wait(self) -> None:
        """Until everything is on disk. Raises what went wrong."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


class _Rotation(ocp.checkpoint_managers.PreservationPolicy):
    def __init__(self, limit: int | None):
        self.limit, self.best = limit, None  # type: tuple[int | None, int | None]

    def should_preserve(self, checkpoints, *, context):
        kept = kept_steps([c.step for c in checkpoints], self.limit, self.best)
        return [c.step in kept for c in checkpoints]
