"""Save and restore the `checkpoint-N` folders of a run, by orbax."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.errors import JaxRuntimeError

from llama_jax.base.bucket import absolute, remove_tree
from llama_jax.base.errors import InputError
from llama_jax.distributed.storage import handler, restore_args, tree_bytes
from llama_jax.setup.job import kept_steps

_STEP = re.compile(r"checkpoint-(0|[1-9]\d*)")
_ORBAX = ("_CHECKPOINT_METADATA", "commit_success.txt")  # the files beside the folders of a checkpoint


class _HFNames(ocp.path.step.NameFormat):
    """Name the steps `checkpoint-N`, as the HF Trainer does."""

    def build_name(self, step: int) -> str:
        return f"checkpoint-{step}"

    def find_all(self, base_path):
        for path in epath.Path(base_path).iterdir():
            whole = all((path / item).is_dir() for item in ("state", "run"))  # the HF Trainer writes neither
            if whole and (match := _STEP.fullmatch(path.name)) and ocp.path.step.is_path_finalized(path):
                yield ocp.path.step.Metadata(step=int(match[1]), path=path)

    def find_step(self, base_path, step: int):
        for found in self.find_all(base_path):
            if found.step == step:
                return found
        raise ValueError(f"no checkpoint-{step} in {base_path}")


def find_steps(output_dir: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, oldest first."""
    return sorted(m.step for m in _HFNames().find_all(output_dir)) if output_dir.is_dir() else []


def find_foreign(output_dir: Path) -> list[str]:
    """Return the names of folders that another program wrote as `checkpoint-N`, as the HF Trainer does, by N."""
    found = (p.name for p in _named(output_dir) if any(f.is_file() and f.name not in _ORBAX for f in p.iterdir()))
    return sorted(found, key=lambda name: int(name.removeprefix("checkpoint-")))


def _named(output_dir: Path) -> list[Path]:
    """Return the folders named `checkpoint-N`, complete or not."""
    return [path for path in output_dir.iterdir() if _STEP.fullmatch(path.name)] if output_dir.is_dir() else []


def _remove_remnants(output_dir: Path) -> None:
    """Remove the rest of checkpoints whose removal was interrupted."""
    whole = find_steps(output_dir)
    for path in _named(output_dir):
        if int(path.name.removeprefix("checkpoint-")) not in whole:
            remove_tree(path)


def remove_steps(output_dir: Path) -> None:
    """Remove all complete checkpoints in a folder."""
    for step in find_steps(output_dir):
        remove_tree(output_dir / _HFNames().build_name(step))


def read_run(output_dir: Path, step: int) -> dict[str, Any]:
    """Read the JSON saved beside the state of a step. Raises InputError."""
    with _restoring(output_dir, step), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(absolute(output_dir) / _HFNames().build_name(step) / "run")


@contextlib.contextmanager
def _restoring(output_dir: Path, step: int, besides: str = "") -> Iterator[None]:
    """Turn any exception into an InputError about a damaged checkpoint, unless memory is short: orbax and tensorstore
    raise many kinds."""
    try:
        yield
    except (JaxRuntimeError, MemoryError):
        raise
    except Exception as e:
        older = [s for s in find_steps(output_dir) if s < step]
        fix = f"--resume_from_checkpoint {output_dir}/checkpoint-{older[-1]}" if older else "start anew"
        why = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise InputError(
            f"{output_dir}/checkpoint-{step}: is damaged{besides}; move it away and {fix}: {why}"
        ) from None


@jax.jit
def _digest(x: jax.Array) -> jax.Array:
    """Return the sum of an array's elements as bits, each times an odd number made from its indices, uint32.

    One wrong bit always changes the sum. Padding zeros and the sharding do not.
    """
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    for axis, odd in enumerate(np.asarray([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D], np.uint32)[: x.ndim]):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=jax.typeof(bits).sharding)
        bits = bits * (2 * place * odd + 1)
    return bits.sum(dtype=jnp.uint32)


def digests(state: Any) -> dict[str, int]:
    """Return the `_digest` of each array of a tree, by its path."""
    # One at a time: sharding.IN_FLIGHT has the reason.
    return {jax.tree_util.keystr(path): int(_digest(x)) for path, x in jax.tree_util.tree_leaves_with_path(state)}


class Checkpoints:
    """Keep the `checkpoint-N` folders of a run, at most `limit` of them (None or 0: all), for states like `abstract`.

    The run resumes at step `first`. Later checkpoints, of an earlier attempt, are removed when the first new checkpoint
    is written. A state that fits this host's memory twice is copied there and written while the run continues; a
    larger state is written piece by piece while the run waits.
    """

    def __init__(self, output_dir: Path, limit: int | None, abstract: Any, first: int):
        self._folder, self._rotation = output_dir, _Rotation(limit)
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
        self._manager = ocp.CheckpointManager(absolute(output_dir), options=options, item_handlers=handlers)
        self._past = [step for step in self._manager.all_steps() if step > first]

    def save(self, step: int, state: Any, run: dict[str, Any], best: int | None = None) -> None:
        """Write `state` (a pytree of arrays) and `run` (JSON) as `checkpoint-<step>`; the state may be donated after.

        Rotation keeps the checkpoint of step `best`.
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
        """Restore the state of a step in the types and placements of `abstract`, a pytree of ShapeDtypeStruct.

        The model must be the checkpoint's: a leaf of another length is taken for another mesh's padding. Raises
        InputError.
        """
        with _restoring(self._folder, step, ", or of another model or optimizer"):
            state = self._manager.restore(step, args=ocp.args.Composite(state=restore_args(abstract)))["state"]
        saved = read_run(self._folder, step).get("digests", {})  # checkpoints of before 2026-11-27 have none
        with _restoring(self._folder, step):
            wrong = [path for path, digest in digests(state).items() if saved and saved[path] != digest]
            if wrong:
                raise ValueError(f"{len(wrong)} of {len(saved)} arrays are not what was saved, {wrong[0]} first")
        return state

    def keep_only(self, step: int) -> None:
        """Remove all checkpoints except a step's."""
        self.wait()
        for other in self._manager.all_steps():
            if other != step:
                self._manager.delete(other)

    def wait(self) -> None:
        """Block until every checkpoint is on disk. Raises the exceptions of the writes."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Close the orbax manager."""
        self._manager.close()


class _Rotation(ocp.checkpoint_managers.PreservationPolicy):
    """Keep the steps of `kept_steps`."""

    def __init__(self, limit: int | None):
        self.limit, self.best = limit, None  # type: tuple[int | None, int | None]

    def should_preserve(self, checkpoints, *, context):
        kept = kept_steps([c.step for c in checkpoints], self.limit, self.best)
        return [c.step in kept for c in checkpoints]
