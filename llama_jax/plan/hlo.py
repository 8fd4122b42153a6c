"""Read a compiled program's optimized HLO: collectives by mesh axes, kernels and a TPU's cycles, counted with the trips
of loops."""

import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
# Instructions that only move or rename numbers.
_MOVES = frozenset(
    "parameter constant tuple get-tuple-element bitcast bitcast-convert reshape transpose copy copy-start copy-done "
    "slice dynamic-slice dynamic-update-slice concatenate pad broadcast iota convert".split()
)
_PRODUCTS = frozenset(("convolution", "dot"))
_BEGUN = ("call-start", "async-start")  # a computation beside the others, as on a TPU's sparse cores
_NOT_NEW = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "constant", "copy-done", "opt-barrier")


class Instruction(NamedTuple):
    """Hold an HLO instruction: `kind` is the opcode, `result` its type as text, `rest` all after the first bracket."""

    name: str
    result: str
    kind: str
    rest: str
    root: bool

    def attribute(self, name: str) -> str:
        """Return the name that follows `name=`, or ""."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])

    @property
    def cycles(self) -> int:
        """Return the TPU compiler's estimate of the cycles, 0 where it has none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else 0

    @property
    def kernel(self) -> str:
        """Return the name of the Pallas kernel that is called on a TPU, "" where none is."""
        calls = self.kind == "custom-call" and 'custom_call_target="tpu_custom_call"' in self.rest
        return re.sub(r"[.\d]+$", "", self.name) if calls else ""


class Collective(NamedTuple):
    """Describe a collective that a step runs `times` times.

    `sent` is a device's bytes each time in a ring of n: (n - 1) / n of the array, twice as many for an all-reduce.
    The device `waits` for a collective that does not overlap with other work.
    """

    kind: str
    axes: tuple[str, ...]
    result: str
    sent: int
    times: int
    waits: bool


class Exchange(NamedTuple):
    """Describe an instruction's part in a collective: `sent` bytes of a device in all, the same `key` in each part.

    The device goes on where an exchange `begins`, and waits where it `ends`; both in one part overlap with nothing.
    """

    kind: str
    axes: tuple[str, ...]
    result: str
    sent: int
    key: str
    begins: bool
    ends: bool


class Program:
    """Parse an HLO module's text."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self.name = found[1] if (found := re.match(r"HloModule ([\w.\-]+)", text)) else ""
        lines: list[Instruction] = []
        for line in text.splitlines():
            if header := _HEADER.match(line):
                lines = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif found := _LINE.match(line):
                root, name, result, kind, rest = found.groups()
                lines.append(Instruction(name=name, result=result, kind=kind, rest=rest, root=bool(root)))

    @cached_property
    def times(self) -> dict[str, int]:
        """Count a step's runs of each computation."""
        callers: dict[str, list[tuple[str, int]]] = {}
        for caller, lines in self.computations.items():
            for line in lines:
                trips = self.trips(caller, line) if line.kind == "while" else 1
                for called in _called(line):
                    callers.setdefault(called, []).append((caller, trips))
        times: dict[str, int] = {self.entry: 1}

        def count(name: str) -> int:
            if name not in times:
                times[name] = sum(count(caller) * trips for caller, trips in callers.get(name, []))
            return times[name]

        for name in self.computations:
            count(name)
        return times

    def trips(self, caller: str, loop: Instruction) -> int:
        """Return the trips of a loop whose condition compares a counter with a constant and whose body adds a constant.
        Raises ValueError for other loops."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = self._by_name(loop.attribute("condition"))
        body = self._by_name(loop.attribute("body"))
        compare = next(i for i in condition.values() if i.root)
        limits = [n for name in compare.operands if (n := _constant(condition[name])) is not None]
        counters = [condition[n] for n in compare.operands if condition[n].kind == "get-tuple-element"]
        if len(limits) != 1 or len(counters) != 1 or "direction=LT" not in compare.rest:
            raise ValueError(f"the loop {loop.name} does not count up to a constant")
        index = int(counters[0].attribute("index"))
        start = self._element(self._by_name(caller), loop.operands[0], index)
        step_of = body[next(i for i in body.values() if i.root).operands[index]]
        steps = [n for name in step_of.operands if (n := _constant(body[name])) is not None]
        step = steps[0] if step_of.kind == "add" and steps else 1
        return math.ceil((limits[0] - start) / step)

    def _element(self, lines: dict[str, Instruction], name: str, index: int) -> int:
        """Return the constant in a tuple, 0 where the element is none."""
        made = lines[name]
        value = lines.get(made.operands[index]) if made.kind == "tuple" else None
        while value is not None and value.kind in ("copy", "convert", "bitcast"):
            value = lines.get(value.operands[0])
        return (_constant(value) if value else None) or 0

    def _by_name(self, computation: str) -> dict[str, Instruction]:
        return {i.name: i for i in self.computations[computation]}

    def collectives(self, mesh: Mapping[str, int]) -> list[Collective]:
        """Return all collectives that a step runs on a mesh of these axes, the most bytes first.

        A collective that overlaps other work is split over several fusions of one chain, or runs on sparse cores. It
        runs as often as the fusion that starts it: a gather of the head may overlap with all layers of a loop.
        """
        found: dict[str, Collective] = {}
        begun: set[str] = set()
        for computation, lines in self.computations.items():
            for line in lines:
                times = self.times[computation]
                e = self._exchange(computation, line, mesh) if times else None
                if e and e.key not in begun and (e.key not in found or e.begins or found[e.key].times < times):
                    begun |= {e.key} if e.begins else set()
                    found[e.key] = Collective(e.kind, e.axes, e.result, e.sent, times, e.begins and e.ends)
        return sorted(found.values(), key=lambda c: -c.sent * c.times)

    def exchanges(self, computation: str, line: Instruction, mesh: Mapping[str, int]) -> list[Exchange]:
        """Return the exchanges of an instruction, those of the computations that it runs too."""
        inside = [e for c in _called(line) for i in self.computations[c] for e in self.exchanges(c, i, mesh)]
        own = self._exchange(computation, line, mesh)
        return [own, *inside] if own else inside

    def _exchange(self, computation: str, line: Instruction, mesh: Mapping[str, int]) -> Exchange | None:
        """Return the exchange of an instruction, None where it is no collective."""
        kind, starts = line.kind.removesuffix("-start"), line.kind.endswith("-start")
        if kind not in COLLECTIVES:
            return None
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # on TPUs, a fusion of an all-reduce and a slice
        axes, size = _axes(line.rest, mesh)
        arrays = _arrays(line.result)
        if starts and len(arrays) > 1 and kind != "all-reduce":  # operands first, then results
            arrays = arrays[1:2] if kind == "collective-permute" else arrays[len(arrays) // 2 :]
        share = (size - 1) / size if size > 1 else 0.0
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0, "reduce-scatter": share * size}
        if kind == "reduce-scatter" and line.kind == "all-reduce":
            factor["reduce-scatter"] = share
        sent = int(sum(n for _, n in arrays) * factor.get(kind, share))
        key, begins, ends = f"{computation} {line.name}", True, not (starts or computation in self._beside)
        if chain := re.search(r'chain_id="(\d+)"', line.rest):
            key = f"{chain[1]} {line.attribute('channel_id')}"
            begins, ends = (
                any(f'"AsyncCollective{part}"' in i.rest for i in self.computations[computation])
                for part in ("Start", "Done")
            )
        return Exchange(kind, axes, ", ".join(text for text, _ in arrays[:2]), sent, key, begins, ends)

    @cached_property
    def _beside(self) -> set[str]:
        """Return the computations that run beside others, as on a TPU's sparse cores."""
        return {c for lines in self.computations.values() for i in lines if i.kind in _BEGUN for c in _called(i)}

    def _run(self) -> Iterator[tuple[str, Instruction]]:
        """Yield the instructions outside fusions, with their computation, where a step runs them."""
        for name, lines in self.computations.items():
            if name not in self._fused and self.times[name]:
                yield from ((name, line) for line in lines)

    @cached_property
    def _fused(self) -> set[str]:
        """Return the computations inside an instruction other than a loop."""
        return {c for lines in self.computations.values() for i in lines if i.kind != "while" for c in _called(i)}

    @property
    def cycles(self) -> dict[str, int]:
        """Sum the TPU compiler's estimates of cycles, as if none overlapped: of instructions with a "matmul", of those
        that only "copy", and of other ones, "elementwise". Collectives and Pallas kernels have no estimate."""
        sums = dict.fromkeys(("matmul", "elementwise", "copy"), 0)
        for computation, line in self._run():
            if cycles := line.cycles:
                kinds = self._kinds(line)
                kind = "matmul" if kinds & _PRODUCTS else "copy" if kinds <= _MOVES | {"fusion"} else "elementwise"
                sums[kind] += self.times[computation] * cycles
        return sums

    def _kinds(self, line: Instruction) -> set[str]:
        """Return the opcodes of an instruction and of all inside."""
        return {line.kind}.union(*(self._kinds(i) for c in _called(line) for i in self.computations[c]))

    @property
    def kernels(self) -> dict[str, int]:
        """Count a step's calls of each Pallas kernel of a TPU, by the kernel's name."""
        counts: dict[str, int] = {}
        for computation, line in self._run():
            if name := line.kernel:
                counts[name] = counts.get(name, 0) + self.times[computation]
        return counts

    def largest(self, count: int) -> list[tuple[str, int, str]]:
        """Return the largest arrays that a step makes: type and shape, bytes, and the operation of their origin."""
        sizes: dict[str, tuple[int, str]] = {}
        for _, line in self._run():
            if line.kind in _NOT_NEW or line.kind.endswith(("-start", "-done")):
                continue
            name = re.search(r'op_name="([^"]*)"', line.rest)
            for text, size in _arrays(line.result):
                if text not in sizes or not sizes[text][1]:
                    sizes[text] = (size, name[1] if name else "")
        ordered = sorted(sizes.items(), key=lambda item: -item[1][0])
        return [(text, size, name) for text, (size, name) in ordered[:count]]


def _called(line: Instruction) -> list[str]:
    """Return the computations that an instruction runs, without the scalar function of a reduction."""
    if line.kind == "while":
        return [line.attribute("body")]
    names = [line.attribute("calls")] if "calls=" in line.rest else []
    if line.kind in ("call", "call-start"):
        names.append(line.attribute("to_apply"))
    for key in ("branch_computations", "called_computations"):
        if found := re.search(rf"{key}=\{{([^}}]*)\}}", line.rest):
            names += re.findall(r"%([\w.\-]+)", found[1])
    return [name for name in names if name]


def _constant(line: Instruction) -> int | None:
    found = re.match(r"(-?\d+)\)", line.rest) if line.kind == "constant" else None
    return int(found[1]) if found else None


def _arrays(result: str) -> list[tuple[str, int]]:
    """Return the arrays of a type, as text, with their bytes."""
    found = []
    for kind, shape in _ARRAY.findall(result):
        if kind in _BYTES:
            size = _BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n)
            found.append((f"{kind}[{shape}]", size))
    return found


def _axes(rest: str, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """Return the mesh axes that a collective runs over, and the number of devices in a group."""
    groups = _groups(rest, math.prod(mesh.values()))
    coordinates = np.stack(np.unravel_index(groups, tuple(mesh.values())))  # [axes, groups, members]
    moves = (coordinates != coordinates[:, :, :1]).any(axis=(1, 2))
    return tuple(axis for axis, moving in zip(mesh, moves, strict=True) if moving), groups.shape[1]


def _groups(rest: str, devices: int) -> np.ndarray:
    """Parse the groups of devices, [groups, members], in any of HLO's four notations."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", rest):
        return np.array([[int(n) for n in p.split(",")] for p in re.findall(r"\{([\d,]+)\}", pairs[1])])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        return _named_groups(named[1], named[2])
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, source = ([int(n) for n in counted[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(source)).reshape(source)
        if counted[3]:
            ids = ids.transpose([int(n) for n in counted[3].split(",")])
        return ids.reshape(shape)
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return np.array([[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", listed[1])])
    return np.arange(devices)[None]


def _named_groups(mesh: str, axes: str) -> np.ndarray:
    """Compute the groups along axes of the compiler's own mesh, such as `'axis_0'=16,'axis_1'=1` along `'axis_0'`.
    A group may span a part of an axis: `'axis_0':(2)4` is the factor of 4 after the axis' leading factor of 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    along: dict[str, tuple[int, int]] = {}
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes):
        along[name] = (int(before), int(size)) if size else (1, sizes[name])
    shape: list[int] = []
    moving: list[int] = []
    for name, size in sizes.items():
        before, inside = along.get(name, (size, 1))
        moving += [len(shape) + 1] if name in along else []
        shape += [before, inside, size // (before * inside)]
    ids = np.arange(math.prod(shape)).reshape(shape)
    still = [i for i in range(len(shape)) if i not in moving]
    return ids.transpose([*still, *moving]).reshape(-1, math.prod(shape[i] for i in moving))
