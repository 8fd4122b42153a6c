"""Replay a TPU's scheduled program: its operations one after the other, its collectives on the links beside them."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from llama_jax.plan.chips import Chip
from llama_jax.plan.hlo import Program


class Replay(NamedTuple):
    """Hold the seconds of a step: of work, and of waiting for links."""

    work: float
    waiting: float


class _Step(NamedTuple):
    """Describe an instruction: exchanges that begin, by key their seconds on the links; seconds of work; the keys of
    exchanges that end; trips of a loop's body."""

    begun: Mapping[str, float]
    work: float
    ended: tuple[str, ...]
    body: str
    trips: int


def replay(program: Program, chip: Chip, mesh: Mapping[str, int], kernels: float) -> Replay:
    """Return the time of a step on a chip whose clock is known, in the order in which the program is scheduled.

    An operation takes the compiler's cycles, a Pallas kernel an equal part of the `kernels` seconds. A collective takes
    the links for its bytes at their published rate, after those that began before it, and the device waits where the
    collective ends. Copies that run beside other work take no time, nor do bytes of memory: the cycles have them.
    """
    assert chip.clock
    of_kernel = kernels / max(sum(program.kernels.values()), 1)
    steps = {name: [*_steps(program, name, chip, mesh, of_kernel)] for name, times in program.times.items() if times}
    now = links = waiting = 0.0
    ends: dict[str, float] = {}

    def play(computation: str) -> None:
        nonlocal now, links, waiting
        for begun, work, ended, body, trips in steps[computation]:
            for _ in range(trips):
                play(body)
            for key, seconds in begun.items():
                links = ends[key] = max(links, now) + seconds
            now += work
            for key in ended:
                end = ends.pop(key, now)
                waiting += max(0.0, end - now)
                now = max(now, end)

    play(program.entry)
    return Replay(now - waiting, waiting)


def _steps(
    program: Program, computation: str, chip: Chip, mesh: Mapping[str, int], of_kernel: float
) -> Iterator[_Step]:
    """Yield the steps of a computation, but for instructions that take no time."""
    assert chip.clock
    for line in program.computations[computation]:
        if line.kind == "while":
            yield _Step({}, 0.0, (), line.attribute("body"), program.trips(computation, line))
            continue
        work = line.cycles / chip.clock + of_kernel * bool(line.kernel)
        exchanges = program.exchanges(computation, line, mesh)
        begun = {e.key: e.sent / chip.link_rate for e in exchanges if e.begins}
        ended = tuple(e.key for e in exchanges if e.ends)
        if begun and line.kind.endswith("-start"):
            begun = {f"{computation} {line.name}": sum(begun.values())}
        elif line.kind.endswith("-done"):
            ended = (f"{computation} {line.operands[0]}",)
        if begun or ended or work:
            yield _Step(begun, work, ended, "", 0)
