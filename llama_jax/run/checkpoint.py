"""Save and restore the `checkpoint-N` folders of a run, by orbax."""

import contextlib
import hashlib
import json
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

from llama_jax.base.bucket import absolute, is_remote, remove_tree
from llama_jax.base.errors import InputError
from llama_jax.distributed import processes
from llama_jax.distributed.digest import sums
from llama_jax.distributed.platform import host_memory
from llama_jax.distributed.storage import handler, restore_args, tree_bytes
from llama_jax.run.ownership import Ledger
from llama_jax.setup.job import kept_steps

_STEP = re.compile(r"checkpoint-(0|[1-9]\d*)")
_ITEMS = ("state", "run")  # the folders of a checkpoint; the HF Trainer writes neither
FORMAT = 2  # of the JSON since 2026-11-29, which is sealed


class Damaged(InputError):
    """Report a checkpoint that is not what was saved under its name."""


class _HFNames(ocp.path.step.NameFormat):
    """Name the steps `checkpoint-N`, as the HF Trainer does."""

    def build_name(self, step: int) -> str:
        return f"checkpoint-{step}"

    def find_all(self, base_path):
        for path in epath.Path(base_path).iterdir():
            whole = _STEP.fullmatch(path.name) and all((path / item).is_dir() for item in _ITEMS)
            if whole and ocp.path.step.is_path_finalized(path):
                yield ocp.path.step.Metadata(step=number(path.name), path=path)

    def find_step(self, base_path, step: int):
        for found in self.find_all(base_path):
            if found.step == step:
                return found
        raise ValueError(f"no checkpoint-{step} in {base_path}")


def find_steps(output_dir: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, oldest first."""
    return sorted(m.step for m in _HFNames().find_all(output_dir)) if output_dir.is_dir() else []


def find_foreign(output_dir: Path) -> list[str]:
    """Return the names of `checkpoint-N` that are no checkpoints of this program, nor the rest of one, by N."""
    if not output_dir.is_dir():
        return []
    named = [path.name for path in output_dir.iterdir() if _STEP.fullmatch(path.name)]
    ours = {*find_steps(output_dir), *Ledger(output_dir).removing}
    return sorted((name for name in named if number(name) not in ours), key=number)


def number(name: str) -> int:
    """Return N of `checkpoint-N`, -1 of any other name."""
    return int(match[1]) if (match := _STEP.fullmatch(name)) else -1


def remove_steps(output_dir: Path, steps: list[int]) -> None:
    """Remove complete checkpoints of a folder, and the rest of those whose removal was interrupted."""
    ledger, whole = Ledger(output_dir), find_steps(output_dir)
    ledger.remove(steps)
    for step in ledger.removing:
        path = output_dir / _HFNames().build_name(step)
        if path.is_dir() and (step in steps or step not in whole):
            remove_tree(path)


def set_aside(output_dir: Path, step: int) -> Path:
    """Rename a damaged checkpoint, so that no later step finds it, and return its path. Nothing is removed."""
    path = output_dir / _HFNames().build_name(step)
    names = (f"damaged-{path.name}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 10**6))))
    return path.rename(next(new for name in names if not (new := output_dir / name).exists()))


def _seal(values: dict[str, Any]) -> str:
    """Return the SHA-256 of JSON values without their own seal."""
    text = json.dumps({key: value for key, value in values.items() if key != "seal"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_run(checkpoint: Path) -> dict[str, Any]:
    """Read and check the JSON saved beside a state. Raises InputError, and Damaged where it is not what was saved."""
    with _restoring(checkpoint):
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            values = checkpointer.restore(absolute(checkpoint) / "run")
        if not isinstance(values, dict):
            raise ValueError("its JSON holds no object")
        # Older JSON has neither: two keys, so that the loss of one is seen.
        if ("format" in values or "seal" in values) and (values.get("format"), values.get("seal")) != (
            FORMAT,
            _seal(values),
        ):
            raise ValueError("its JSON is not what was saved")
        step = values["trainer_state"]["global_step"]
        if step != number(checkpoint.name):
            raise ValueError(f"it holds update {step}, under another name")
        return values


@contextlib.contextmanager
def _restoring(checkpoint: Path, besides: str = "") -> Iterator[None]:
    """Turn any exception into Damaged, unless memory is short or the disk fails: orbax and tensorstore raise many
    kinds."""
    try:
        yield
    except (JaxRuntimeError, MemoryError, InputError):
        raise
    except PermissionError as e:
        raise InputError(f"{checkpoint}: cannot be read: {e.strerror}: {e.filename}") from None
    except Exception as e:
        why = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise Damaged(f"{checkpoint}: is damaged{besides}: {why}") from None


@jax.jit
def _digest(x: jax.Array) -> jax.Array:
    """Return the sum of an array's elements as bits, each times an odd number made from its indices, uint32.

    Checkpoints of before 2026-11-29 hold it. One wrong bit always changes the sum; values that differ only in high bits
    may change places.
    """
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    for axis, odd in enumerate(np.asarray([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D], np.uint32)[: x.ndim]):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=jax.typeof(bits).sharding)
        bits = bits * (2 * place * odd + 1)
    return bits.sum(dtype=jnp.uint32)


def _old_digests(state: Any) -> dict[str, int]:
    """Return the `_digest` of each array of a tree, by its path."""
    return {jax.tree_util.keystr(path): int(_digest(x)) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def restore_state(checkpoint: Path, abstract: Any) -> Any:
    """Restore the state of a checkpoint in the types and placements of `abstract`, a pytree of ShapeDtypeStruct.

    The model must be the checkpoint's: a leaf of another length is taken for another mesh's padding. Raises InputError,
    and Damaged where the state is not what was saved. All processes raise the same.
    """
    state, error = None, ""
    try:
        checkpointer = ocp.Checkpointer(handler(abstract, _is_large(abstract)))
        with _restoring(checkpoint, ", or of another model or optimizer"), checkpointer:
            state = checkpointer.restore(absolute(checkpoint) / "state", args=restore_args(abstract))
        run = read_run(checkpoint)
        saved = run.get("digests", {})  # checkpoints of before 2026-11-27 have none
        with _restoring(checkpoint):
            found: dict[str, Any] = (sums if "format" in run else _old_digests)(state) if saved else {}
            wrong = [path for path, value in found.items() if saved[path] != value]
            if wrong:
                raise ValueError(f"{len(wrong)} of {len(saved)} arrays are not what was saved, {wrong[0]} first")
    except Damaged as e:
        error = str(e)
    if first := next(filter(None, processes.exchange(error)), None):
        raise Damaged(first)
    return state


def _is_large(abstract: Any) -> bool:
    """Return whether a state does not fit this host's memory twice."""
    return tree_bytes(abstract) > host_memory() // 2


class Checkpoints:
    """Keep the `checkpoint-N` folders of a run, at most `limit` of them (None or 0: all), for states like `abstract`.

    `run` is the identity of the run, which resumes at step `first`. Later checkpoints, of an earlier attempt, are
    removed when the first new checkpoint is written. A state that fits this host's memory twice is copied there and
    written while the run continues; a larger state is written piece by piece while the run waits.
    """

    def __init__(self, output_dir: Path, limit: int | None, abstract: Any, *, first: int, run: str):
        self._ledger, self._run = Ledger(output_dir) if jax.process_index() == 0 else None, run
        self._folder, self._rotation = output_dir, _Rotation(limit, self._ledger)
        if self._ledger:
            remove_steps(output_dir, [])
            self._ledger.begin(run)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._rotation,
            step_name_format=_HFNames(),
            cleanup_tmp_directories=True,
        )
        self._piecewise = _is_large(abstract)
        handlers = {"state": handler(abstract, self._piecewise), "run": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(absolute(output_dir), options=options, item_handlers=handlers)
        self._saving = False
        self._past = [step for step in self._manager.all_steps() if step > first]

    def save(
        self, step: int, state: Any, run: dict[str, Any], best: int | None = None, finite: int | None = None
    ) -> None:
        """Write `state` (a pytree of arrays) and `run` (JSON) as `checkpoint-<step>`; the state may be donated after.

        Rotation keeps the checkpoint of step `best`, and beyond the limit that of `finite`.
        """
        self._rotation.best, self._rotation.finite = best, finite
        self._saving = True
        if self._ledger and is_remote(self._folder):  # a bucket shows a checkpoint before it is whole
            self._ledger.remove([step])
        self._delete(self._past)
        self._past = []
        # As JSON reads it back.
        run = json.loads(json.dumps({**run, "run": self._run, "format": FORMAT, "digests": sums(state)}))
        saved = ocp.args.JsonSave({**run, "seal": _seal(run)})
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), run=saved)
        self._manager.save(step, args=args, force=True)
        if self._piecewise:
            self.wait()
        self._saving = False

    @property
    def saving(self) -> bool:
        """Return whether a checkpoint is being written."""
        return self._saving or self._manager.is_saving_in_progress()

    def keep_only(self, step: int) -> None:
        """Remove all checkpoints except a step's, and the last finite one where later ones are not."""
        self.wait()
        kept = (step, self._rotation.finite)
        self._delete([other for other in self._manager.all_steps() if other not in kept])

    def _delete(self, steps: list[int]) -> None:
        if self._ledger:
            self._ledger.remove(steps)
        for step in steps:
            self._manager.delete(step)

    def wait(self) -> None:
        """Block until every checkpoint is on disk. Raises the exceptions of the writes."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Close the orbax manager."""
        self._manager.close()


class _Rotation(ocp.checkpoint_managers.PreservationPolicy):
    """Keep the steps of `kept_steps` and the last finite one, and write the others into the ledger before orbax."""

    def __init__(self, limit: int | None, ledger: Ledger | None):
        self.limit, self._ledger = limit, ledger
        self.best: int | None = None
        self.finite: int | None = None

    def should_preserve(self, checkpoints, *, context):
        kept = {*kept_steps([c.step for c in checkpoints], self.limit, self.best), self.finite}
        if self._ledger:
            self._ledger.remove(c.step for c in checkpoints if c.step not in kept)
        return [c.step in kept for c in checkpoints]
