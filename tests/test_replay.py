"""A replayed program: the time of a step with its collectives beside it, against sums by hand."""

import pytest

from llama_jax.plan.chips import Chip
from llama_jax.plan.hlo import Program
from llama_jax.plan.replay import replay

# Long lines, as the compiler writes them.
# ruff: noqa: E501

# A cycle is a second; a gather of f32[4,8] sends 3/4 of 128 bytes: 96, at 4 bytes a second 24 seconds.
CHIP = Chip("tpu", "TPU", 1, flops=1, memory_rate=1, link_rate=4, clock=1)
MESH = {"data": 1, "fsdp": 4}
GATHER = "replica_groups=[1,4]<=[4], dimensions={0}"


def instruction(name: str, opcode: str, rest: str = "", result: str = "f32[4,8]", cycles: int = 0) -> str:
    told = f', backend_config={{"estimated_cycles":"{cycles}"}}' if cycles else ""
    return f"  %{name} = {result}{{1,0}} {opcode}({rest}{told}\n"


def work(cycles: int, name: str = "work") -> str:
    return instruction(name, "copy", "%x)", cycles=cycles)


def program(entry: str, *computations: str) -> Program:
    return Program(
        "HloModule jit_step\n\n" + "".join(computations) + "ENTRY %main (x: f32[1,8]) -> f32[1,8] {\n" + entry + "}\n"
    )


def computation(name: str, body: str, end: str = "") -> str:
    return f"%{name} (x: f32[1,8]) -> f32[4,8] {{\n{body}}}{end}\n\n"


WHOLE = instruction("whole", "all-gather", f"%x), {GATHER}")


def times(entry: str, *computations: str, kernels: float = 0) -> tuple[float, float]:
    return replay(program(entry, *computations), CHIP, MESH, kernels)


def test_a_collective_alone() -> None:
    """The device waits for all of it, but for the cycles of its own fusion."""
    assert times(work(10) + WHOLE + work(5)) == (15, 24)
    fused = instruction("fused", "fusion", "%x), kind=kCustom, calls=%inside", cycles=4)
    assert times(work(10) + fused, computation("inside", WHOLE)) == (14, 20)


@pytest.mark.parametrize(("between", "waiting"), [(10, 14), (24, 0), (30, 0)])
@pytest.mark.parametrize("form", ["collective", "sparse cores", "chain"])
def test_a_collective_beside_work(form: str, between: int, waiting: int) -> None:
    """The device waits for what the work between its start and its end leaves."""
    computations: list[str] = []
    if form == "collective":
        start = instruction("begun", "all-gather-start", f"%x), {GATHER}", "(f32[1,8]{1,0}, f32[4,8]")
        end = instruction("done", "all-gather-done", "%begun)")
    elif form == "sparse cores":
        computations = [computation("sparse", WHOLE, ', execution_thread="sparsecore"')]
        start = instruction("begun", "call-start", "%x), to_apply=%sparse", "((f32[1,8]), f32[4,8]")
        end = instruction("done", "call-done", "%begun)")
    else:
        part = instruction("part", "all-gather", f'%x), channel_id=7, {GATHER}, frontend_attributes={{chain_id="3"}}')
        start = end = middle = ""
        for name in ("Start", "Middle", "Done"):
            called = instruction("called", "custom-call", f'%part), custom_call_target="AsyncCollective{name}"')
            computations.append(computation(name, part + called * (name != "Middle")))
        start, middle, end = (instruction(f"f{c}", "fusion", f"%x), calls=%{c}") for c in ("Start", "Middle", "Done"))
        between, extra = between - 3, 3
        assert times(start + work(between) + middle + work(extra) + end, *computations) == (between + extra, waiting)
        return
    assert times(start + work(between) + end, *computations) == (between, waiting)


def test_collectives_one_after_the_other() -> None:
    """Two that begin together take the links in turn; a copy beside them does not wait for the links."""
    starts = "".join(
        instruction(name, "all-gather-start", f"%x), {GATHER}", "(f32[1,8]{1,0}, f32[4,8]") for name in ("a", "b")
    )
    copies = instruction("c", "copy-start", "%x)"), instruction("d", "copy-done", "%c)")
    ends = [instruction(f"{name}.done", "all-gather-done", f"%{name})") for name in ("a", "b")]
    assert times(starts + "".join(copies) + work(30) + ends[0] + ends[1]) == (30, 48 - 30)
    assert times(starts + "".join(copies) + ends[0] + work(5) + ends[1]) == (5, 24 + 19)


def test_a_loop() -> None:
    """Each trip plays on from the last one; a gather that begins before the loop is under way in it."""
    loop = '  %loop = f32[4,8]{1,0} while(%x), condition=%never, body=%body, backend_config={"known_trip_count":{"n":"5"}}\n'
    assert times(loop, computation("body", work(3) + WHOLE)) == (15, 5 * 24)
    start = instruction("early", "all-gather-start", f"%x), {GATHER}", "(f32[1,8]{1,0}, f32[4,8]")
    end = instruction("late", "all-gather-done", "%early)")
    assert times(start + loop + end, computation("body", work(4))) == (20, 4)


def test_kernels_have_equal_parts() -> None:
    """A kernel beside a gather hides it."""
    kernel = "".join(
        instruction(f"kernel_fwd.{i}", "custom-call", '%x), custom_call_target="tpu_custom_call"') for i in (1, 2)
    )
    start = instruction("begun", "all-gather-start", f"%x), {GATHER}", "(f32[1,8]{1,0}, f32[4,8]")
    end = instruction("done", "all-gather-done", "%begun)")
    assert times(start + kernel + end, kernels=20) == (20, 4)
    assert times(start + end + kernel, kernels=20) == (20, 24)
