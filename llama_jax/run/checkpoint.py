"""Save and restore the `checkpoint-N` folders of a run, by orbax."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from llama_jax.base.bucket import absolute, is_remote, remove_tree
from llama_jax.base.errors import FailedAlone, InputError, RunError, disk_problem
from llama_jax.distributed.digest import sums
from llama_jax.distributed.storage import handler
from llama_jax.distributed.watchdog import lost_connection
from llama_jax.hf.checkpoint import FORMAT, is_checkpoint, is_large, read_sealed, restore, restoring, seal
from llama_jax.run.ownership import Ledger
from llama_jax.setup.job import kept_steps

_STEP = re.compile(r"checkpoint-(0|[1-9]\d*)")


class _HFNames(ocp.path.step.NameFormat):
    """Name the steps `checkpoint-N`, as the HF Trainer does."""

    def build_name(self, step: int) -> str:
        return f"checkpoint-{step}"

    def find_all(self, base_path):
        for path in epath.Path(base_path).iterdir():
            whole = _STEP.fullmatch(path.name) and is_checkpoint(path)
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


def find_removable(output_dir: Path, kept: list[int]) -> list[Path]:
    """Return the folders that a run removes before or while it saves, of a folder without foreign checkpoints: those of
    other steps than `kept`, and the rests of interrupted writes."""
    names = {_HFNames().build_name(step) for step in kept}
    ours = (path for path in output_dir.glob("checkpoint-*") if _STEP.fullmatch(path.name.partition(".orbax-")[0]))
    return [path for path in ours if path.name not in names]


def set_aside(output_dir: Path, step: int) -> Path:
    """Rename a damaged checkpoint, so that no later step finds it, and return its path. Nothing is removed."""
    path = output_dir / _HFNames().build_name(step)
    names = (f"damaged-{path.name}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 10**6))))
    return path.rename(next(new for name in names if not (new := output_dir / name).exists()))


def read_run(checkpoint: Path) -> dict[str, Any]:
    """Read and check the JSON saved beside a state. Raises InputError, and Damaged where it is not what was saved."""
    values = read_sealed(checkpoint)
    with restoring(checkpoint):
        step = values["trainer_state"]["global_step"]
        if step != number(checkpoint.name):
            raise ValueError(f"it holds update {step}, under another name")
    return values


def restore_state(checkpoint: Path, abstract: Any) -> Any:
    """Restore the state of a checkpoint as `hf.checkpoint.restore` does. Raises InputError."""
    return restore(checkpoint, abstract, read_run(checkpoint))


class _Noted:
    """Wrap the write of an orbax handler and append its exception to a list."""

    def __init__(self, write: Any, failures: list[BaseException]):
        self._write, self._failures = write, failures

    def result(self, timeout: float | None = None) -> Any:
        """Block until the write is done. Raises its exception."""
        try:
            return self._write.result(timeout)
        except BaseException as e:
            self._failures.append(e)
            raise

    def cancel(self) -> bool | None:
        """Cancel the write."""
        return self._write.cancel()


class _Noting(ocp.PyTreeCheckpointHandler):
    """Save arrays, and keep the exceptions of writes in `failures`: among several processes, orbax raises them only
    once the others have met, which wait for this one."""

    failures: list[BaseException]

    async def async_save(self, *args: Any, **options: Any) -> Any:
        """Start the writes."""
        return [_Noted(write, self.failures) for write in await super().async_save(*args, **options) or ()]


class _BesideModel(ocp.JsonCheckpointHandler):
    """Save JSON, and beside its folder the small files of a model, by name, before the checkpoint gets its own name."""

    def __init__(self, files: Mapping[str, bytes]):
        super().__init__()
        self._files = files

    def finalize(self, directory: epath.Path) -> None:
        """Write the files. Orbax calls this once for all processes, when all of them have written their arrays."""
        for name, content in self._files.items():
            path = directory.parent / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@ocp.args.register_with_handler(_Noting, for_save=True, for_restore=True)
@dataclass
class _NotingArgs(ocp.args.PyTreeSave):
    """Hold the arrays to save by `_Noting`."""


@ocp.args.register_with_handler(_BesideModel, for_save=True, for_restore=True)
@dataclass
class _BesideModelArgs(ocp.args.JsonSave):
    """Hold the JSON to save by `_BesideModel`."""


class Checkpoints:
    """Keep the `checkpoint-N` folders of a run, at most `limit` of them (None or 0: all), for states like `abstract`.

    `run` is the identity of the run, which resumes at step `first`. Later checkpoints, of an earlier attempt, are
    removed when the first new checkpoint is written. A state that fits this host's memory twice is copied there and
    written while the run continues; a larger state is written piece by piece while the run waits. `files` are the
    small files of the model, by name, that each checkpoint holds too.
    """

    def __init__(
        self, output_dir: Path, limit: int | None, abstract: Any, *, first: int, run: str, files: Mapping[str, bytes]
    ):
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
        self._piecewise = is_large(abstract)
        self._files = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        arrays = handler(abstract, self._piecewise, _Noting)
        self._failures: list[BaseException] = []
        arrays.failures = self._failures
        handlers = {"state": arrays, "run": _BesideModel(files)}
        self._manager = ocp.CheckpointManager(absolute(output_dir), options=options, item_handlers=handlers)
        self._saving = self._writing = False
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
        more = {"run": self._run, "format": FORMAT, "digests": sums(state), "files": self._files}
        run = json.loads(json.dumps({**run, **more}))
        saved = _BesideModelArgs({**run, "seal": seal(run)})
        args = ocp.args.Composite(state=_NotingArgs(state), run=saved)
        self.wait()  # orbax would, and raise the last write's exception as this one's
        self._step, self._writing = step, True
        with self._reporting():
            self._manager.save(step, args=args, force=True)
        if self._piecewise:
            self.wait()
        self._saving = False

    def check(self) -> None:
        """Raise RunError where a write in the background has failed. Meant for each update: returns at once."""
        if self._failures:
            with self._reporting():
                raise self._failures[0]
        if self._writing and not self._manager.is_saving_in_progress():
            self.wait()
            self._writing = False

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
        """Block until every checkpoint is on disk. Raises RunError where a write has failed."""
        with self._reporting():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turn an exception of a write into a RunError that names the checkpoint to go on from."""
        try:
            yield
        except InputError:
            raise
        except Exception as e:
            if jax.process_count() > 1 and lost_connection(e):  # no fault of the disk
                raise
            reason = disk_problem(e) or f"writing failed: {type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
            steps = find_steps(self._folder)
            on = f"go on from checkpoint-{steps[-1]} with --resume_from_checkpoint True" if steps else "start anew"
            error = RunError(f"{reason}; checkpoint-{self._step} is not saved: repair the disk or make room, and {on}")
            if jax.process_count() > 1:
                raise FailedAlone from error
            raise error from None

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
