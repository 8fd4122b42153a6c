"""What is read from a program's text, against the groups that a loop makes and the sums that the loops ask for."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from llama_jax.plan.hlo import Program, _axes
from llama_jax.plan.schedule import read_schedule

MESH = {"data": 2, "fsdp": 4, "tensor": 2}


def groups_along(axes: tuple[str, ...]) -> list[list[int]]:
    """The devices, numbered in the mesh's order, that differ in these axes alone."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, place in enumerate(itertools.product(*(range(n) for n in MESH.values()))):
        rest = tuple(x for axis, x in zip(MESH, place, strict=True) if axis not in axes)
        groups.setdefault(rest, []).append(number)
    return list(groups.values())


def braces(groups: list[list[int]]) -> str:
    return "{" + ",".join("{" + ",".join(map(str, g)) + "}" for g in groups) + "}"


@pytest.mark.parametrize("axes", [c for n in (1, 2, 3) for c in itertools.combinations(MESH, n)])
def test_the_axes_of_a_collective(axes: tuple[str, ...]) -> None:
    groups = groups_along(axes)
    size = len(groups[0])
    assert _axes(f"%x), replica_groups={braces(groups)}, dimensions={{0}}", MESH) == (axes, size)
    named = ",".join(f"'a{i}'={n}" for i, n in enumerate(MESH.values()))
    along = ",".join(f"'a{[*MESH].index(axis)}'" for axis in axes)
    assert _axes(f"%x), replica_groups=mesh[{named}] {{{along}}}, channel_id=1", MESH) == (axes, size)
    order = [i for i, axis in enumerate(MESH) if axis not in axes] + [[*MESH].index(axis) for axis in axes]
    counted = f"[{16 // size},{size}]<=[2,4,2]T({','.join(map(str, order))})"
    assert _axes(f"%x), replica_groups={counted}, channel_id=1", MESH) == (axes, size)
    ring = [[g[i], g[(i + 1) % size]] for g in groups for i in range(size)]
    assert _axes(f"%x), channel_id=1, source_target_pairs={braces(ring)}", MESH)[0] == axes


def test_axes_as_the_compiler_cuts_them() -> None:
    """One axis of the compiler's own mesh, of which a part is ours; and no groups, which is all devices."""
    assert _axes("%x), replica_groups=mesh['a'=16] {'a':(2)4}, channel_id=1", MESH) == (("fsdp",), 4)
    assert _axes("%x), replica_groups=mesh['a'=16] {'a':(8)2}, channel_id=1", MESH) == (("tensor",), 2)
    assert _axes("%x), replica_groups={}, channel_id=1", MESH) == (("data", "fsdp", "tensor"), 16)
    assert _axes("%x), replica_groups=[8,2]<=[16], channel_id=1", MESH) == (("tensor",), 2)


# Long lines, as the compiler writes them.
# ruff: noqa: E501
PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_computation.1 (p: bf16[64,8]) -> bf16[64,32] {
  %p = bf16[64,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[64,32]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={1}, frontend_attributes={chain_id="0"}
}

%async_collective_fusion.1 (p.2: bf16[64,8]) -> bf16[64,32] {
  %p.2 = bf16[64,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[64,32]{1,0:S(1)} all-gather(%p.2), channel_id=7, replica_groups=[1,4]<=[4], dimensions={1}, frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.1 (p.3: f32[128]) -> (f32[32], f32[16]) {
  %p.3 = f32[128]{0} parameter(0)
  %all-reduce.3 = (f32[128]{0}, f32[64]{0}) all-reduce(%p.3), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[32]{0} slice(%all-reduce.3), slice={[0:32]}
}

%inner_body (q: (u32[], bf16[64,8])) -> (u32[], bf16[64,8]) {
  %q = (u32[], bf16[64,8]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%q), index=0
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %x = bf16[64,8]{1,0} get-tuple-element(%q), index=1
  %cp = (bf16[64,8]{1,0}, bf16[64,8]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %cpd = bf16[64,8]{1,0} collective-permute-done(%cp)
  ROOT %t = (u32[], bf16[64,8]{1,0}) tuple(%next, %cpd)
}

%inner_cond (q.1: (u32[], bf16[64,8])) -> pred[] {
  %limit = u32[] constant(8)
  %q.1 = (u32[], bf16[64,8]{1,0}) parameter(0)
  %i.1 = u32[] get-tuple-element(%q.1), index=0
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

%body (r: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
  %r = (s32[], bf16[64,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%r), index=0
  %one = s32[] constant(1)
  %up = s32[] add(%j, %one)
  %y = bf16[64,8]{1,0} get-tuple-element(%r), index=1
  %gather = bf16[64,32]{1,0} fusion(%y), kind=kCustom, calls=%fused_computation.1, backend_config={"estimated_cycles":"100"}
  %again = bf16[64,32]{1,0} fusion(%y), kind=kCustom, calls=%async_collective_fusion.1
  %start = u32[] constant(2)
  %init = (u32[], bf16[64,8]{1,0}) tuple(%start, %y)
  %ring = (u32[], bf16[64,8]{1,0}) while(%init), condition=%inner_cond, body=%inner_body
  %z = bf16[64,8]{1,0} get-tuple-element(%ring), index=1
  ROOT %t.1 = (s32[], bf16[64,8]{1,0}) tuple(%up, %z)
}

%cond (r.1: (s32[], bf16[64,8])) -> pred[] {
  %r.1 = (s32[], bf16[64,8]{1,0}) parameter(0)
  %j.1 = s32[] get-tuple-element(%r.1), index=0
  %layers = s32[] constant(5)
  ROOT %lt.1 = pred[] compare(%j.1, %layers), direction=LT
}

ENTRY %main (w: bf16[64,8], g: f32[128]) -> f32[32] {
  %w = bf16[64,8]{1,0} parameter(0)
  %g = f32[128]{0} parameter(1)
  %zero = s32[] constant(0)
  %init.1 = (s32[], bf16[64,8]{1,0}) tuple(%zero, %w)
  %loop = (s32[], bf16[64,8]{1,0}) while(%init.1), condition=%cond, body=%body
  %big = f32[1000,1000]{1,0} broadcast(%zero), dimensions={}, metadata={op_name="jit(step)/made"}
  %norm = (f32[]{:T(128)}, f32[4]{0}) all-reduce(%g, %g), channel_id=4, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %rs = f32[32]{0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1, backend_config={"estimated_cycles":"7"}
}
"""


def test_a_program() -> None:
    program = Program(PROGRAM)
    found = {(c.kind, c.axes): (c.sent, c.times) for c in program.collectives({"fsdp": 2, "tensor": 2})}
    assert found == {
        # The two fusions are steps of one gather: 3 of 4 parts of 64 x 32 x 2 bytes, in each of 5 layers.
        ("all-gather", ("fsdp", "tensor")): (3072, 5),
        ("collective-permute", ("fsdp", "tensor")): (1024, 15),  # 2, 4, 6 below 8; and 5 layers
        ("all-reduce", ("tensor",)): (20, 1),  # twice half of 4 + 16 bytes
        ("reduce-scatter", ("fsdp", "tensor")): (576, 1),  # 3 of 4 parts of (128 + 64) x 4; another's channel again
    }
    assert program.name == "jit_step" and sum(program.cycles.values()) == program.cycles["elementwise"] == 5 * 100 + 7
    assert [c.kind for c in program.collectives({"fsdp": 2, "tensor": 2}) if c.waits] == [
        "reduce-scatter",
        "all-reduce",
    ]
    assert program.largest(1) == [("f32[1000,1000]", 4_000_000, "jit(step)/made")]


def test_a_loop_that_does_not_count() -> None:
    with pytest.raises(ValueError, match="loop"):
        Program(PROGRAM.replace("direction=LT", "direction=NE")).collectives({"fsdp": 4})


def test_a_counted_loop_may_say_so() -> None:
    told = re.sub(r"(body=%body)", r'\1, backend_config={"known_trip_count":{"n":"9"}}', PROGRAM)
    (gather,) = (c for c in Program(told).collectives({"fsdp": 4}) if c.kind == "all-gather")
    assert gather.times == 9 and np.prod(gather.sent) == 3072


def test_a_gather_that_overlaps_with_a_loop_runs_once() -> None:
    """Its start is outside the loop; each trip moves a part of it."""
    gather = (
        'all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}, frontend_attributes={chain_id="0"}'
    )
    text = f"""HloModule jit_step

%inside (p: bf16[64,8]) -> bf16[256,8] {{
  %p = bf16[64,8]{{1,0}} parameter(0)
  ROOT %part = bf16[256,8]{{1,0}} {gather}
}}

%start (p: bf16[64,8]) -> bf16[256,8] {{
  %p = bf16[64,8]{{1,0}} parameter(0)
  %whole = bf16[256,8]{{1,0}} {gather}
  ROOT %begun = bf16[256,8]{{1,0}} custom-call(%whole), custom_call_target="AsyncCollectiveStart"
}}

%body (q: bf16[64,8]) -> bf16[64,8] {{
  %q = bf16[64,8]{{1,0}} parameter(0)
  %moved = bf16[256,8]{{1,0}} fusion(%q), kind=kCustom, calls=%inside
  ROOT %same = bf16[64,8]{{1,0}} copy(%q)
}}

ENTRY %main (x: bf16[64,8]) -> bf16[64,8] {{
  %x = bf16[64,8]{{1,0}} parameter(0)
  %first = bf16[256,8]{{1,0}} fusion(%x), kind=kCustom, calls=%start
  ROOT %loop = bf16[64,8]{{1,0}} while(%x), condition=%never, body=%body, backend_config={{"known_trip_count":{{"n":"12"}}}}
}}
"""
    (found,) = Program(text).collectives({"data": 1, "fsdp": 4})
    assert (found.kind, found.times, found.sent) == ("all-gather", 1, 256 * 8 * 2 * 3 // 4)


@pytest.mark.parametrize("begun", ["call-start(%q), to_apply=", "async-start(%q), calls="])
def test_a_gather_on_sparse_cores(begun: str) -> None:
    """It runs in each trip, beside other work; its own cycles are not the device's."""
    text = f"""HloModule jit_step

%sparse (p: bf16[64,8]) -> bf16[256,8] {{
  %p = bf16[64,8]{{1,0}} parameter(0)
  ROOT %whole = bf16[256,8]{{1,0}} all-gather(%p), replica_groups=[1,4]<=[4], dimensions={{0}}, backend_config={{"estimated_cycles":"9"}}
}}, execution_thread="sparsecore"

%body (q: bf16[64,8]) -> bf16[64,8] {{
  %q = bf16[64,8]{{1,0}} parameter(0)
  %begun = ((bf16[64,8]), bf16[256,8]) {begun}%sparse, async_execution_thread="sparsecore"
  ROOT %same = bf16[64,8]{{1,0}} copy(%q), backend_config={{"estimated_cycles":"2"}}
}}

ENTRY %main (x: bf16[64,8]) -> bf16[64,8] {{
  %x = bf16[64,8]{{1,0}} parameter(0)
  ROOT %loop = bf16[64,8]{{1,0}} while(%x), condition=%never, body=%body, backend_config={{"known_trip_count":{{"n":"12"}}}}
}}
"""
    program = Program(text)
    (found,) = program.collectives({"data": 1, "fsdp": 4})
    assert (found.kind, found.times, found.sent, found.waits) == ("all-gather", 12, 256 * 8 * 2 * 3 // 4, False)
    assert sum(program.cycles.values()) == 24


COMPILED = """HloModule jit_step

%product (a: bf16[4,4]) -> bf16[4,4] {
  %a = bf16[4,4]{1,0} parameter(0)
  %copied = bf16[4,4]{0,1} copy(%a)
  ROOT %dot.1 = bf16[4,4]{1,0} convolution(%a, %copied), dim_labels=bf_io->bf
}

%moved (b: bf16[4,4]) -> f32[4,4] {
  %b = bf16[4,4]{1,0} parameter(0)
  ROOT %wide = f32[4,4]{1,0} convert(%b)
}

%body (r: (s32[], bf16[4,4])) -> (s32[], bf16[4,4]) {
  %r = (s32[], bf16[4,4]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%r), index=0
  %one = s32[] constant(1)
  %up = s32[] add(%j, %one), backend_config={"estimated_cycles":"1"}
  %y = bf16[4,4]{1,0} get-tuple-element(%r), index=1
  %kernel_fwd_residuals.3 = bf16[4,4]{1,0} custom-call(%y), custom_call_target="tpu_custom_call", metadata={x={
}}
  %z = bf16[4,4]{1,0} fusion(%kernel_fwd_residuals.3), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"10"}
  ROOT %t = (s32[], bf16[4,4]{1,0}) tuple(%up, %z)
}

%cond (r.1: (s32[], bf16[4,4])) -> pred[] {
  %r.1 = (s32[], bf16[4,4]{1,0}) parameter(0)
  %j.1 = s32[] get-tuple-element(%r.1), index=0
  %layers = s32[] constant(6)
  ROOT %lt.1 = pred[] compare(%j.1, %layers), direction=LT
}

ENTRY %main (w: bf16[4,4]) -> f32[4,4] {
  %w = bf16[4,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], bf16[4,4]{1,0}) tuple(%zero, %w)
  %loop = (s32[], bf16[4,4]{1,0}) while(%init), condition=%cond, body=%body
  %end = bf16[4,4]{1,0} get-tuple-element(%loop), index=1
  %kernel_fwd_residuals = bf16[4,4]{1,0} custom-call(%end), custom_call_target="tpu_custom_call"
  ROOT %out = f32[4,4]{1,0} fusion(%kernel_fwd_residuals), kind=kLoop, calls=%moved, backend_config={"estimated_cycles":"100"}
}
"""


def test_cycles_and_kernels_of_a_tpu() -> None:
    """Each by the kind of its work, times the trips of its loop."""
    program = Program(COMPILED)
    assert program.cycles == {"matmul": 6 * 10, "elementwise": 6, "copy": 100}
    assert program.kernels == {"kernel_fwd_residuals": 7}


SCHEDULE = """hlo_module {
  name: "jit_step"
  computations {
    name: "body"
    instructions {
      name: "z"
      opcode: "fusion"
      id: 71
    }
    id: 7
  }
  computations {
    name: "main"
    instructions {
      name: "loop"
      opcode: "while"
      called_computation_ids: 8
      called_computation_ids: 7
      id: 12
    }
    instructions {
      name: "out"
      opcode: "fusion"
      id: 13
    }
    id: 1
  }
}
computation_schedules {
  computation_id: 7
  instructions {
    id: 71
    end_timestamp_cycles: 30.5
  }
  scheduler_statistics {
    total_wasted_cycles: 20
    total_cycles: 30.5
  }
}
computation_schedules {
  computation_id: 1
  instructions {
    id: 12
    start_timestamp_cycles: 5
    end_timestamp_cycles: 188
  }
  instructions {
    id: 13
    start_timestamp_cycles: 188
    end_timestamp_cycles: 200
  }
  scheduler_statistics {
    total_cycles: 200
  }
}
"""


def test_a_schedule(tmp_path: Path) -> None:
    """The loop's body counts six times, and its interval in the caller not at all."""
    program = Program(COMPILED)
    assert read_schedule(tmp_path, program) is None
    file = tmp_path / "jit_step.schedule.txt"
    file.write_text(SCHEDULE)
    assert read_schedule(tmp_path, program) == (6 * 10.5 + 17, 6 * 20, 0)
    module, _, caller = SCHEDULE.split("computation_schedules {")
    last = caller.replace("total_cycles: 200", "total_cycles: 203")
    file.write_text("computation_schedules {".join((module, caller, last)))
    assert read_schedule(tmp_path, program) == (203, 0, 183)  # scheduled again, with the loop's time
    file.write_text(SCHEDULE.replace('"body"', '"another"'))
    with pytest.raises(ValueError, match="another"):
        read_schedule(tmp_path, program)
