"""Keep an output folder to one run: a lock, and a ledger of the run's identity and of the checkpoints it removes."""

import contextlib
import os
import platform
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llama_jax.base.bucket import is_remote
from llama_jax.base.errors import InputError
from llama_jax.base.files import lock, parse_json, write_json
from llama_jax.reporting.progress import say

LOCK, LEDGER = ".llama_jax.lock", ".llama_jax.json"
_MODELS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "adapter_model.safetensors")


@contextlib.contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises InputError. A bucket has no locks, and of a file system without them the user is
    warned."""
    if is_remote(output_dir):
        yield
        return
    path = output_dir / LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            warning = lock(file, path)
        except BlockingIOError:
            holder = os.read(file, 200).decode(errors="replace")
            os.close(file)
            raise InputError(
                f"output_dir {output_dir}: another run writes there ({holder or 'it is starting'}); wait for its end, "
                "or choose another --output_dir"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):  # else the last holder removed the file
                break
        os.close(file)
    if warning:
        say(warning)
    os.ftruncate(file, 0)
    with contextlib.suppress(OSError):  # a full disk: the lock holds without the name of its holder
        os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


class Ledger:
    """Hold the identity of the run that owns a folder, "" before its first checkpoint, and the steps that it removes.

    A removal that a kill interrupts leaves a part of a checkpoint. Only the ledger tells such a part from a folder of
    the same name that another program wrote.
    """

    def __init__(self, output_dir: Path):
        self._path = output_dir / LEDGER
        values: Any = {}
        if self._path.is_file():
            with contextlib.suppress(InputError):  # without a ledger nothing is removed
                values = parse_json(self._path.read_bytes(), str(self._path))
        values = values if isinstance(values, dict) else {}
        self.run = str(values.get("run", ""))
        removing = values.get("removing", [])
        self.removing = {step for step in removing if isinstance(step, int)} if isinstance(removing, list) else set()

    def remove(self, steps: Iterable[int]) -> None:
        """Write down that the checkpoints of these steps are being removed, before their removal. A part of them is no
        checkpoint."""
        if not self.removing.issuperset(steps := set(steps)):
            self.removing |= steps
            self._write()

    def begin(self, run: str) -> None:
        """Write down the run's identity and forget finished removals."""
        self.run, self.removing = run, set()
        self._write()

    def _write(self) -> None:
        write_json(self._path, {"run": self.run, "removing": sorted(self.removing)})


def new_identity() -> str:
    """Draw the identity of a run."""
    return uuid.uuid4().hex


def find_model(folder: Path) -> str:
    """Return the name of a file with the weights of a finished model or adapter in the folder, "" where it has none."""
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return ""
    return next((path.name for pattern in _MODELS for path in sorted(folder.glob(pattern))), "")
