"""Read the place of this process among several, as its launcher wrote it into the environment."""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple


class Launcher(NamedTuple):
    """Name the variables in which a launcher gives a process its place. `told_by` is set in its processes alone."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    told_by: str = ""


TORCH = Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SLURM = Launcher("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "", told_by="SLURM_STEP_NODELIST")
# The innermost first: SLURM starts mpirun, and either starts torchrun. `accelerate launch` and `deepspeed` set the
# variables of torchrun. Outside a step of srun, SLURM's describe the allocation; within, srun may set PMI's too.
LAUNCHERS = (
    TORCH,
    Launcher(
        "Open MPI's mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher(
        "MVAPICH's mpirun",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher(
        "MPICH's mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", told_by="MPI_LOCALRANKID"
    ),
    SLURM,
)
DEFAULT_PORT = 29500  # torchrun's


class PlaceError(ValueError):
    """Report variables that contradict each other, in one line with the fix."""


class Place(NamedTuple):
    """Hold the number of a process among `size`, and on its host; None where the launcher does not tell."""

    launcher: Launcher
    rank: int
    size: int
    local_rank: int | None
    local_size: int | None

    @property
    def alone_on_host(self) -> bool:
        return self.local_size == 1


def find_place(env: Mapping[str, str] = os.environ) -> Place | None:
    """Return the place of this process, or None where it was started alone. Raises PlaceError.

    A launcher of one process is passed over: the variables may be left over, or another launcher started several such.
    """
    incomplete: list[tuple[Launcher, int | None, int | None]] = []
    for launcher in LAUNCHERS:
        if launcher.told_by and not env.get(launcher.told_by):
            continue
        rank, size = _number(env, launcher.rank), _number(env, launcher.size)
        if size is not None and (size < 1 or (rank or 0) >= size):
            at = f"{launcher.rank} is {rank} and " if rank is not None else ""
            raise _refused(f"{at}{launcher.size} is {size}: a process of N has a number from 0 to N - 1", launcher)
        if (size or 1) == 1 and not rank:
            continue
        if rank is None or size is None:
            incomplete.append((launcher, rank, size))
            continue
        for other, *known in incomplete:
            for name, theirs, own in zip((other.rank, other.size), known, (rank, size), strict=True):
                if theirs not in (None, own):
                    raise _refused(f"{name} is {theirs}, and {launcher.name} has {own} for it", other)
        return _place(env, launcher, rank, size)
    for launcher, rank, size in incomplete:
        given, missing = (launcher.size, launcher.rank) if rank is None else (launcher.rank, launcher.size)
        raise _refused(f"{given} is {size if rank is None else rank}, but {missing} is not set", launcher)
    return None


def rank_of(env: Mapping[str, str] = os.environ) -> int:
    """Return the number of this process, 0 where it was started alone or its environment is refused."""
    try:
        place = find_place(env)
    except PlaceError:
        return 0
    return place.rank if place else 0


def _place(env: Mapping[str, str], launcher: Launcher, rank: int, size: int) -> Place:
    local_rank = _number(env, launcher.local_rank)
    local_size = _tasks_of_node(env) if launcher is SLURM else _number(env, launcher.local_size)
    if local_size is not None and not (local_rank or 0) < local_size <= size:
        raise _refused(
            f"{launcher.local_rank} is {local_rank}, the processes of this host are {local_size} and all {size}: each "
            "should be below the next",
            launcher,
        )
    return Place(launcher, rank, size, local_rank, local_size)


def _tasks_of_node(env: Mapping[str, str]) -> int | None:
    """Return the number of srun's tasks on this node, of a list such as 4(x2),3; None where SLURM does not tell."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if not (found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)):
            return None
        counts += [int(found[1])] * int(found[2] or 1)
    node = _number(env, "SLURM_NODEID")
    return counts[node] if node is not None and node < len(counts) else None


def _number(env: Mapping[str, str], name: str) -> int | None:
    """Return a variable as a number, None where it is missing or empty. Raises PlaceError."""
    text = env.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch("[0-9]{1,9}", text):
        raise PlaceError(f"{name} is {text!r}: should be a number, as torchrun sets it; or unset it")
    return int(text)


def _refused(problem: str, launcher: Launcher) -> PlaceError:
    names = " ".join(name for name in launcher[1:5] if name)
    return PlaceError(
        f"{problem} (the environment of {launcher.name}); start all processes by one launcher, or one process without: "
        f"unset {names}"
    )
