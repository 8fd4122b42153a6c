"""Read the schedule that the TPU's compiler writes of a program: the time of computation, and of waiting for links."""

import re
from pathlib import Path
from typing import NamedTuple

from llama_jax.plan.hlo import Program


class Schedule(NamedTuple):
    """Hold the cycles of a step by the compiler's latency-hiding scheduler: of computation, and `exposed`, in which a
    device waits for a collective. Pallas kernels count nothing. `rough` are those of `compute` that rest on the
    caller's estimate of loops."""

    compute: float
    exposed: float
    rough: float


def dumping(folder: str | Path) -> tuple[tuple[str, str | bool], ...]:
    """Return the compiler options by which a TPU's program leaves its schedule in a folder."""
    return ("xla_dump_to", str(folder)), ("xla_dump_latency_hiding_schedule", True)


def read_schedule(folder: str | Path, program: Program) -> Schedule | None:
    """Return the schedule that the compilation of `program` left in the folder, None where it left none.

    A computation's own cycles are those of its instructions but for loops, whose bodies have schedules of their own,
    times the trips that the program has. Where memory is short, the compiler schedules the caller again and leaves two
    schedules of it, none of the bodies. The last one counts then, and its own estimate of the loops, as `rough` work:
    in a program with both, that was 9 and 25% below the bodies' time. Raises ValueError for a computation that the
    program lacks.
    """
    file = Path(folder) / f"{program.name}.schedule.txt"
    if not file.exists():
        return None
    module, *parts = file.read_text().split("\ncomputation_schedules {")
    names: dict[float, str] = {}
    loops: dict[float, set[float]] = {}  # the computations of each
    for computation in module.split("\n  computations {")[1:]:
        head, *instructions = computation.split("\n    instructions {")
        names[_number(computation, r"\n    id")] = _first(head, r'name: "([^"]*)"')
        for i in instructions:
            if 'opcode: "while"' in i:
                loops[_number(i, r"\n      id")] = set(map(float, re.findall(r"called_computation_ids: (\d+)", i)))
    compute = exposed = rough = 0.0
    schedules = {_number(part, "computation_id"): part for part in parts}
    apart = {loop for loop, computations in loops.items() if computations & schedules.keys()}
    for number, part in schedules.items():
        timeline, _, statistics = part.partition("scheduler_statistics")
        name = names.get(number, "without a name")
        if name not in program.times:
            raise ValueError(f"the program has no computation {name}, which its schedule has")
        own, waiting = (_number(statistics, key) for key in ("total_cycles", "total_wasted_cycles"))
        for i in timeline.split("\n  instructions {")[1:]:
            if (loop := _number(i, r"\bid")) in loops:
                cycles = _number(i, "end_timestamp_cycles") - _number(i, "start_timestamp_cycles")
                if loop in apart:
                    own -= cycles
                else:
                    rough += program.times[name] * cycles
        compute += program.times[name] * (own - waiting)
        exposed += program.times[name] * waiting
    return Schedule(compute, exposed, rough)


def _number(text: str, key: str) -> float:
    """Return the first number of a key in protobuf's text, 0 where it is left out, as zeros are."""
    found = re.search(rf"{key}: ([\d.e+]+)", text)
    return float(found[1]) if found else 0.0


def _first(text: str, pattern: str) -> str:
    found = re.search(pattern, text)
    assert found, text[:80]
    return found[1]
