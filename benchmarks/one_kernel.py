#!/usr/bin/env python3
"""Decode one token of each prompt through all layers of LLaMA-7B in one kernel of Pallas' Mosaic GPU, for a Hopper GPU.

    python benchmarks/one_kernel.py --prompts 1 32 --parts 4 1

Each multiprocessor runs one program of three warpgroups. The first brings weights, keys and values to shared memory,
through a ring of tiles, and runs ahead of the others across layers. The second brings the inputs of products, the third
computes. Between two phases all programs wait for each other (a counter in the GPU's memory). `--parts` divides the
slots of a prompt's cache between programs, for few prompts.

Weights are stacked and random, caches are filled up to slot 576 of 640. Printed are milliseconds of a token and
microseconds of a layer; before, for two layers, errors against float32, relative to the largest element of a result.
`--unordered` leaves the waiting out: results are wrong, and the time is that of reading all bytes.
"""

import argparse
import math
import time
from functools import partial, reduce
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

F32, BF16, I32 = jnp.float32, jnp.bfloat16, jnp.int32
D, F, N, K, H, S = 4096, 11008, 32, 32, 128, 640  # model, ffn, heads, kv heads, head dim, slots
GROUP = N // K
PROGRAMS = 132
TILE, STEP = 64, 128  # outputs and inputs of a tile; slots of a tile of keys or values
INPUT_TILES = 4  # in flight
SHARED = 225 * 1024  # bytes of shared memory
EPS = 1e-6
# One value at a time: a warp has 16 rows, its lanes are 4 rows of 8 columns.
PLAIN = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 8), (16, 8), (4, 8), (1,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)
ROWS, COLUMNS = PLAIN.reduce(1), PLAIN.reduce(0)
WGMMA = plgpu.Layout.WGMMA
SWIZZLED = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
ALL = slice(None)


def div(a, b):
    return lax.div(a, jnp.asarray(b, I32))


def rem(a, b):
    return lax.rem(a, jnp.asarray(b, I32))


def load(ref, index, layout=PLAIN):
    return plgpu.load(ref, index, layout=layout, optimized=False)


def fence():
    """Order ordinary reads and writes with those of the copy engine."""

    @plgpu.inline_mgpu()
    def inline(_):
        from jax._src.lib.mlir import ir
        from jax._src.lib.mlir.dialects import llvm

        llvm.inline_asm(ir.Type.parse("!llvm.void"), [], "fence.proxy.async;", "", has_side_effects=True)

    inline()


class Product:
    """Divide a product evenly over the programs: its tiles of 64 outputs, each in steps of 128 inputs, in one line.

    A tile that two or more programs share has a part of each in the sums [parts, outputs, tokens].
    """

    def __init__(self, outputs: list[int], inputs: int):
        self.starts = [0, *accumulate(size // TILE for size in outputs)]
        self.tiles, self.steps = self.starts[-1], inputs // STEP
        self.work = self.tiles * self.steps
        owners = [((unit + 1) * PROGRAMS - 1) // self.work for unit in range(self.work)]
        self.parts = max(owners[t + self.steps - 1] - owners[t] + 1 for t in range(0, self.work, self.steps))

    def span(self, program):
        return div(program * self.work, PROGRAMS), div((program + 1) * self.work, PROGRAMS)

    def first(self, tile):
        return div((tile * self.steps + 1) * PROGRAMS - 1, self.work)

    def last(self, tile):
        return div((tile * self.steps + self.steps) * PROGRAMS - 1, self.work)

    def sums(self, tokens: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.parts, self.tiles * TILE, tokens), F32)

    def summed(self, sums, tile):
        parts = [load(sums, (part, pl.ds(tile * TILE, TILE), ALL)) for part in range(self.parts)]
        others = self.last(tile) - self.first(tile)
        return reduce(jnp.add, [x if part == 0 else jnp.where(part <= others, x, 0.0) for part, x in enumerate(parts)])


QKV, OUT, GATE_UP, DOWN = Product([N * H, K * H, K * H], D), Product([D], N * H), Product([F, F], D), Product([D], F)


class Weights(NamedTuple):
    """Hold what all layers read: projections [L, out, in], norms [L, D], cos and sin [H / 2, T], positions [T]."""

    q: Any
    k: Any
    v: Any
    o: Any
    gate: Any
    up: Any
    down: Any
    input_norm: Any
    post_norm: Any
    cos: Any
    sin: Any
    positions: Any


class State(NamedTuple):
    """Hold what the kernel changes: the residual stream [D, T], its product with the next norm's weight [T, D], sums of
    its squares [D / 64, T], keys and values [L, B, K, S, H]."""

    x: Any
    h: Any
    squares: Any
    keys: Any
    values: Any


class Between(NamedTuple):
    """Hold what a phase leaves for the next."""

    qkv: Any
    q: Any
    part: Any
    sizes: Any
    attended: Any
    o: Any
    x: Any
    h: Any
    squares: Any
    gate_up: Any
    act: Any
    down: Any


def tokens_of(prompts: int) -> int:
    return -(-prompts // 8) * 8


def make(layers: int, prompts: int, parts: int, ordered: bool = True):
    """Return the function of Weights and State that gives the State after a token."""
    T = tokens_of(prompts)
    tile_bytes = TILE * STEP * 2
    ring_tiles = min(12, (SHARED - INPUT_TILES * T * STEP * 2 - 2 * tile_bytes - 9 * 1024) // tile_bytes)
    phases = 9 + (parts > 1)
    array = jax.ShapeDtypeStruct
    between = Between(
        QKV.sums(T), array((T, N + TILE, H), BF16),
        array((parts, T, N * H), BF16), array((parts * prompts * K, TILE), F32), array((T, N * H), BF16),
        OUT.sums(T), array((D, T), F32), array((T, D), BF16), array((D // TILE, T), F32),
        GATE_UP.sums(T), array((T, F), BF16), DOWN.sums(T),
    )  # fmt: skip
    shared = {
        "ring": plgpu.SMEM((ring_tiles, TILE, STEP), BF16, transforms=SWIZZLED),
        "inputs": plgpu.SMEM((INPUT_TILES, T, STEP), BF16, transforms=SWIZZLED),
        "query": plgpu.SMEM((TILE, H), BF16, transforms=SWIZZLED),
        "stage": plgpu.SMEM((TILE, H), BF16),
        "places": plgpu.SMEM((T,), I32),
        "ring_full": plgpu.Barrier(num_barriers=ring_tiles),
        "ring_free": plgpu.Barrier(num_barriers=ring_tiles),
        "inputs_full": plgpu.Barrier(num_barriers=INPUT_TILES),
        "inputs_free": plgpu.Barrier(num_barriers=INPUT_TILES),
        "query_full": plgpu.Barrier(),
        "query_free": plgpu.Barrier(),
    }

    def body(*refs):
        w, s = Weights(*refs[: len(Weights._fields)]), State(*refs[len(Weights._fields) :][: len(State._fields)])
        b = Between(*refs[-len(Between._fields) :])
        counter = pl.get_global(plgpu.SemaphoreType.REGULAR)
        pl.run_scoped(partial(program, w, s, b, counter), **shared, collective_axes="warpgroup")

    def program(
        w, s, b, counter, *, ring, inputs, query, stage, places,
        ring_full, ring_free, inputs_full, inputs_free, query_full, query_free,
    ):  # fmt: skip
        me = lax.axis_index("program")
        after = 3 + (parts > 1)  # phases before o's product
        products = [
            (QKV, (w.q, w.k, w.v), s.h, 0),
            (OUT, (w.o,), b.attended, after),
            (GATE_UP, (w.gate, w.up), b.h, after + 2),
            (DOWN, (w.down,), b.act, after + 4),
        ]
        own_items = div(prompts * K * parts - me + PROGRAMS - 1, PROGRAMS)

        def item_of(number):
            """Return a share of attention: its number, prompt, kv head, part, last slot, first and end of tiles."""
            item = me + number * PROGRAMS
            head, part = div(item, parts), rem(item, parts)
            prompt, place = div(head, K), w.positions[div(head, K)]
            tiles = div(place, TILE) + 1
            return item, prompt, rem(head, K), part, place, div(part * tiles, parts), div((part + 1) * tiles, parts)

        def wait(layer, phase):
            if ordered:
                plgpu.semaphore_wait(counter, PROGRAMS * (layer * phases + phase), decrement=False, memory_scope="gpu")
                fence()

        def arrive():
            fence()
            plgpu.semaphore_signal(counter, 1, memory_scope="gpu")

        def bring_weights():
            def put(count, tile):
                slot = rem(count, ring_tiles)
                pl.when(count >= ring_tiles)(lambda: plgpu.barrier_wait(ring_free.at[slot]))
                plgpu.copy_gmem_to_smem(tile, ring.at[slot], ring_full.at[slot])
                return count + 1

            def product(layer, count, product, weights):
                first, end = product.span(me)
                for weight, start, stop in zip(weights, product.starts, product.starts[1:], strict=False):

                    def step(unit, count, weight=weight, start=start):
                        tile, inputs = div(unit, product.steps) - start, rem(unit, product.steps)
                        return put(count, weight.at[layer, pl.ds(tile * TILE, TILE), pl.ds(inputs * STEP, STEP)])

                    begin = jnp.maximum(first, start * product.steps)
                    stop = jnp.maximum(begin, jnp.minimum(end, stop * product.steps))
                    count = lax.fori_loop(begin, stop, step, count)
                return count

            def item(layer, number, count):
                _, prompt, head, _, place, first, end = item_of(number)

                def tile(index, count):
                    pl.when(index == div(place, TILE))(lambda: wait(layer, 2))  # this token's key and value are there
                    slots = pl.ds(index * TILE, TILE)
                    count = put(count, s.keys.at[layer, prompt, head, slots, :])
                    return put(count, s.values.at[layer, prompt, head, slots, :])

                return lax.fori_loop(first, end, tile, count)

            def one_layer(layer, count):
                count = product(layer, count, *products[0][:2])
                count = lax.fori_loop(0, own_items, partial(item, layer), count)
                for each, weights, *_ in products[1:]:
                    count = product(layer, count, each, weights)
                return count

            lax.fori_loop(0, layers, one_layer, jnp.int32(0))

        def bring_inputs():
            def queries(number, count):
                _, prompt, head, *_ = item_of(number)
                pl.when(count > 0)(lambda: plgpu.barrier_wait(query_free))
                # The rows after the group's are other queries: no result of theirs is used.
                plgpu.copy_gmem_to_smem(b.q.at[prompt, pl.ds(head * GROUP, TILE), :], query, query_full)
                return count + 1

            def one_layer(layer, counts):
                count, asked = counts
                for product, _, source, phase in products:
                    if product is OUT:
                        wait(layer, 2)
                        asked = lax.fori_loop(0, own_items, queries, asked)
                    wait(layer, phase)

                    def step(unit, count, product=product, source=source):
                        slot = rem(count, INPUT_TILES)
                        pl.when(count >= INPUT_TILES)(lambda: plgpu.barrier_wait(inputs_free.at[slot]))
                        columns = pl.ds(rem(unit, product.steps) * STEP, STEP)
                        plgpu.copy_gmem_to_smem(source.at[:, columns], inputs.at[slot], inputs_full.at[slot])
                        return count + 1

                    count = lax.fori_loop(*product.span(me), step, count)
                return count, asked

            lax.fori_loop(0, layers, one_layer, (jnp.int32(0), jnp.int32(0)))

        def compute():
            def multiply(counts, product, sums):
                first, end = product.span(me)

                def tile(index, counts):
                    begin = jnp.maximum(first, index * product.steps)
                    stop = jnp.minimum(end, (index + 1) * product.steps)

                    def all_steps(total):
                        def step(_, counts):
                            slot, own = rem(counts[0], ring_tiles), rem(counts[1], INPUT_TILES)
                            plgpu.barrier_wait(ring_full.at[slot])
                            plgpu.barrier_wait(inputs_full.at[own])
                            plgpu.wgmma(total, ring.at[slot], plgpu.transpose_ref(inputs.at[own], (1, 0)))
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(ring_free.at[slot])
                            plgpu.barrier_arrive(inputs_free.at[own])
                            return counts[0] + 1, counts[1] + 1

                        lax.fori_loop(begin, stop, step, counts)
                        return total[...]

                    total = pl.run_scoped(all_steps, plgpu.ACC((TILE, T), F32))
                    sums[me - product.first(index), pl.ds(index * TILE, TILE), :] = total
                    return counts[0] + (stop - begin), counts[1] + (stop - begin)

                return lax.fori_loop(
                    div(first, product.steps), div(end + product.steps - 1, product.steps), tile, counts
                )

            def spread(vector, axis):
                return plgpu.layout_cast(lax.broadcast_in_dim(vector, (TILE, T), (axis,)), PLAIN)

            def norm(squares):
                """Return 1 / sqrt(mean(x^2) + eps) of each token."""

                def add(index, total):
                    return total + jnp.sum(load(squares, (pl.ds(index * TILE, TILE), ALL)), axis=0)

                zero = plgpu.layout_cast(jnp.zeros((T,), F32), COLUMNS)
                return lax.rsqrt(lax.fori_loop(0, D // TILE // TILE, add, zero) / D + EPS)

            def own(count, of_tile):
                def step(number, carry):
                    of_tile(me + number * PROGRAMS)
                    return carry

                lax.fori_loop(0, div(count - me + PROGRAMS - 1, PROGRAMS), step, jnp.int32(0))

            def put_rows(ref, tile):
                plgpu.transpose_ref(ref, (1, 0))[...] = tile.astype(BF16)

            def residual(product, sums, x_in, x_out, h, weight, squares):
                def of_tile(index):
                    rows = pl.ds(index * TILE, TILE)
                    x = load(x_in, (rows, ALL)) + product.summed(sums, index)
                    x_out[rows, :] = x
                    squares[index, :] = jnp.sum(x * x, axis=0)
                    put_rows(h.at[:, rows], x * spread(load(weight, (rows,), ROWS).astype(F32), 0))

                own(D // TILE, of_tile)

            def rotate(layer, scale, head):
                low, high = (QKV.summed(b.qkv, 2 * head + half) * spread(scale, 1) for half in (0, 1))
                cos, sin = load(w.cos, (ALL, ALL)), load(w.sin, (ALL, ALL))
                rotated = low * cos - high * sin, high * cos + low * sin

                def as_query():
                    for half, tile in enumerate(rotated):
                        put_rows(b.q.at[:, head, pl.ds(half * TILE, TILE)], tile)

                def into(cache, kv_head, halves):
                    for half, tile in enumerate(halves):
                        put_rows(stage.at[pl.ds(0, T), pl.ds(half * TILE, TILE)], tile)
                    plgpu.commit_smem()

                    @pl.loop(0, prompts)
                    def _(prompt):
                        plgpu.copy_smem_to_gmem(stage.at[prompt], cache.at[layer, prompt, kv_head, places[prompt]])

                    plgpu.wait_smem_to_gmem(0)

                pl.when(head < N)(as_query)
                pl.when((head >= N) & (head < N + K))(lambda: into(s.keys, head - N, rotated))
                pl.when(head >= N + K)(lambda: into(s.values, head - N - K, (low, high)))

            def attend(number, count):
                item, prompt, head, part, place, first, end = item_of(number)
                plgpu.barrier_wait(query_full)

                def tile(index, carry):
                    total, top, size, count = carry
                    slot = rem(count, ring_tiles)
                    plgpu.barrier_wait(ring_full.at[slot])

                    def product(scores):
                        plgpu.wgmma(scores, query, plgpu.transpose_ref(ring.at[slot], (1, 0)))
                        return scores[...]

                    scores = pl.run_scoped(product, plgpu.ACC((TILE, TILE), F32))
                    plgpu.barrier_arrive(ring_free.at[slot])
                    slots = plgpu.broadcasted_iota(I32, (TILE, TILE), 1, layout=WGMMA) + index * TILE
                    scores = jnp.where(slots <= place, scores * (math.log2(math.e) / math.sqrt(H)), -jnp.inf)
                    new = jnp.maximum(top, scores.max(axis=1))
                    shrink = jnp.exp2(top - new)
                    shares = jnp.exp2(scores - lax.broadcast_in_dim(new, scores.shape, [0]))
                    total *= lax.broadcast_in_dim(shrink, total.shape, [0])
                    size = size * shrink + shares.sum(axis=1)
                    shares = shares.astype(BF16)
                    slot = rem(count + 1, ring_tiles)
                    plgpu.barrier_wait(ring_full.at[slot])
                    total = pl.run_state(lambda ref: plgpu.wgmma(ref, shares, ring.at[slot]))(plgpu.ACC.init(total))
                    plgpu.barrier_arrive(ring_free.at[slot])
                    return total, new, size, count + 2

                top, size = (plgpu.layout_cast(jnp.full((TILE,), x, F32), WGMMA.reduce(1)) for x in (-jnp.inf, 0.0))
                total = plgpu.layout_cast(jnp.zeros((TILE, H), F32), WGMMA)
                total, top, size, count = lax.fori_loop(first, end, tile, (total, top, size, count))
                plgpu.barrier_arrive(query_free)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                stage[...] = (total / lax.broadcast_in_dim(jnp.maximum(size, 1e-30), total.shape, [0])).astype(BF16)
                plgpu.commit_smem()
                for row in range(GROUP):
                    columns = pl.ds((head * GROUP + row) * H, H)
                    out = b.attended.at[prompt, columns] if parts == 1 else b.part.at[part, prompt, columns]
                    plgpu.copy_smem_to_gmem(stage.at[row], out)
                if parts > 1:
                    b.sizes[item, :] = top + jnp.log2(size)
                return count

            def combine(index):
                prompt, head = div(index, K), rem(index, K)
                for row in range(GROUP):
                    columns = pl.ds((head * GROUP + row) * H, H)
                    sizes = [b.sizes[index * parts + part, row] for part in range(parts)]
                    top = reduce(jnp.maximum, sizes)
                    shares = [jnp.exp2(size - top) for size in sizes]
                    layout = plgpu.Layout.WG_STRIDED((H,), 1)
                    scaled = [
                        load(b.part, (part, prompt, columns), layout).astype(F32) * share
                        for part, share in enumerate(shares)
                    ]
                    b.attended[prompt, columns] = (reduce(jnp.add, scaled) / reduce(jnp.add, shares)).astype(BF16)

            def activate(scale, index):
                gate, up = (GATE_UP.summed(b.gate_up, index + start) * spread(scale, 1) for start in (0, F // TILE))
                put_rows(b.act.at[:, pl.ds(index * TILE, TILE)], gate / (1 + jnp.exp(-gate)) * up)

            def one_layer(layer, counts):
                def together(phase):
                    arrive()
                    wait(layer, phase)

                wait(layer, 0)
                scale = norm(s.squares)
                counts = multiply(counts, QKV, b.qkv)
                together(1)
                own(N + 2 * K, partial(rotate, layer, scale))
                arrive()
                counts = lax.fori_loop(0, own_items, attend, counts[0]), counts[1]
                plgpu.wait_smem_to_gmem(0)
                together(3)
                if parts > 1:
                    own(prompts * K, combine)
                    together(4)
                counts = multiply(counts, OUT, b.o)
                together(after + 1)
                residual(OUT, b.o, s.x, b.x, b.h, w.post_norm.at[layer], b.squares)
                together(after + 2)
                counts = multiply(counts, GATE_UP, b.gate_up)
                scale = norm(b.squares)
                together(after + 3)
                own(F // TILE, partial(activate, scale))
                together(after + 4)
                counts = multiply(counts, DOWN, b.down)
                together(after + 5)
                weight = w.input_norm.at[jnp.minimum(layer + 1, layers - 1)]  # the last layer's `h` is not used
                residual(DOWN, b.down, b.x, s.x, s.h, weight, s.squares)
                arrive()
                return counts

            places[...] = load(w.positions, (ALL,), COLUMNS)
            lax.fori_loop(0, layers, one_layer, (jnp.int32(0), jnp.int32(0)))

        for number, warpgroup in enumerate((compute, bring_weights, bring_inputs)):
            pl.when(lax.axis_index("warpgroup") == number)(warpgroup)

    kernel = pl.kernel(
        body,
        out_type=list(between),
        mesh=plgpu.Mesh(grid=(PROGRAMS,), grid_names=("program",), num_threads=3, thread_name="warpgroup"),
        name="layers",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=8192, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )

    def token(weights: Weights, state: State) -> State:
        refs = [jax.new_ref(array) for array in state]
        kernel(*weights, *refs)
        return State(*map(jax.freeze, refs))

    return token


def reference(weights: Weights, state: State) -> State:
    """Compute the same in float32 by XLA, without the next token's `h`."""
    einsum = partial(jnp.einsum, precision="highest")
    prompts = state.keys.shape[1]
    cos, sin = (x.T[:prompts, None] for x in (weights.cos, weights.sin))
    places = weights.positions[:prompts]

    def norm(x, weight):
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * weight

    def rotate(y):
        low, high = y[..., : H // 2], y[..., H // 2 :]
        return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1)

    def one_layer(x, layer):
        w, keys, values = layer
        w = Weights(*(array.astype(F32) for array in w), None, None, None)
        h = norm(x, w.input_norm)
        q, k, v = (einsum("TI,OI->TO", h, weight).reshape(prompts, -1, H) for weight in (w.q, w.k, w.v))
        rows = jnp.arange(prompts)
        keys = keys.at[rows, :, places].set(rotate(k).astype(BF16))
        values = values.at[rows, :, places].set(v.astype(BF16))
        scores = einsum("TKGH,TKSH->TKGS", rotate(q).reshape(prompts, K, GROUP, H), keys.astype(F32)) / math.sqrt(H)
        scores = jnp.where(jnp.arange(S) <= places[:, None, None, None], scores, -jnp.inf)
        out = einsum("TKGS,TKSH->TKGH", jax.nn.softmax(scores, -1), values.astype(F32)).reshape(prompts, N * H)
        x = x + einsum("TI,OI->TO", out, w.o)
        h = norm(x, w.post_norm)
        act = jax.nn.silu(einsum("TI,OI->TO", h, w.gate)) * einsum("TI,OI->TO", h, w.up)
        return x + einsum("TI,OI->TO", act, w.down), (keys, values)

    x, (keys, values) = lax.scan(one_layer, state.x.T[:prompts], (weights[:9], state.keys, state.values))
    return State(x.T, None, None, keys, values)


def shapes(layers: int, prompts: int) -> tuple[Weights, State]:
    """Return the shapes and types of the kernel's inputs."""
    T, array = tokens_of(prompts), jax.ShapeDtypeStruct
    q, kv, norm, half = (layers, N * H, D), (layers, K * H, D), (layers, D), (H // 2, T)
    ffn, cache = (layers, F, D), (layers, prompts, K, S, H)
    weights = [array(x, BF16) for x in (q, kv, kv, (layers, D, N * H), ffn, ffn, (layers, D, F), norm, norm)]
    weights += [array(half, F32), array(half, F32), array((T,), I32)]
    x, h, squares = array((D, T), F32), array((T, D), BF16), array((D // TILE, T), F32)
    return Weights(*weights), State(x, h, squares, array(cache, BF16), array(cache, BF16))


def random_inputs(layers: int, prompts: int, place: int) -> tuple[Weights, State]:
    keys = iter(jax.random.split(jax.random.key(0), 16))

    @partial(jax.jit, static_argnums=(1, 2, 3))
    def draw(key, shape, scale, mean):
        pieces = jax.random.split(key, shape[0])
        return lax.map(lambda key: (mean + scale * jax.random.normal(key, shape[1:])).astype(BF16), pieces)

    weights, state = shapes(layers, prompts)
    T = tokens_of(prompts)
    drawn = [draw(next(keys), array.shape, 0.02, 0.0) for array in weights[:7]]
    norms = [draw(next(keys), array.shape, 0.1, 1.0) for array in weights[7:9]]
    places = np.random.default_rng(0).integers(S // 2 + 1, S - 1, T) if layers == 2 else np.full(T, place)
    angles = places * 10000.0 ** (-np.arange(H // 2)[:, None] / (H // 2))
    tables = [jnp.asarray(table, F32) for table in (np.cos(angles), np.sin(angles))]
    x = jax.random.normal(next(keys), (D, T))
    h = (x * norms[0][0][:, None].astype(F32)).T.astype(BF16)
    squares = jnp.sum((x * x).reshape(D // TILE, TILE, T), axis=1)
    cache = [draw(next(keys), array.shape, 1.0, 0.0) for array in state[3:]]
    return Weights._make([*drawn, *norms, *tables, jnp.asarray(places, I32)]), State(x, h, squares, *cache)


def check(prompts: int, parts: int) -> str:
    """Return the errors of two layers: of what is added to the residual stream, of keys and of values."""
    weights, state = random_inputs(2, prompts, 0)
    right = jax.jit(reference)(weights, state)
    found = jax.jit(make(2, prompts, parts))(weights, state)
    x = state.x[:, :prompts]
    pairs = (found.x[:, :prompts] - x, right.x - x), (found.keys, right.keys), (found.values, right.values)
    return ", ".join(
        f"{float(jnp.max(jnp.abs(a.astype(F32) - b.astype(F32))) / jnp.max(jnp.abs(b.astype(F32)))):.1e}"
        for a, b in pairs
    )


def measure(layers: int, prompts: int, parts: int, ordered: bool, repeats: int = 10) -> float:
    """Return the seconds of a token, the median of three times `repeats` tokens."""
    weights, state = random_inputs(layers, prompts, 576)
    token = jax.jit(make(layers, prompts, parts, ordered), donate_argnums=1)
    state = token(weights, state)
    times = []
    for _ in range(3):
        jax.block_until_ready(state)
        started = time.monotonic()
        for _ in range(repeats):
            state = token(weights, state)
        jax.block_until_ready(state)
        times.append((time.monotonic() - started) / repeats)
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--parts", type=int, nargs="+", default=[4, 1], help="one number for each of --prompts")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--unordered", action="store_true")
    args = parser.parse_args()
    print("| prompts | parts | errors: x, keys, values | ms a token | us a layer |\n|--:|--:|---|--:|--:|")
    for prompts, parts in zip(args.prompts, args.parts, strict=True):
        errors = check(prompts, parts)
        seconds = measure(args.layers, prompts, parts, not args.unordered)
        each = 1e6 * seconds / args.layers
        print(f"| {prompts} | {parts} | {errors} | {1e3 * seconds:.2f} | {each:.1f} |", flush=True)


if __name__ == "__main__":
    main()
