"""Score continuations of contexts by their log-likelihood, in packed rows; the perplexity of a text is made of them.

Letters: B rows, T tokens of a row, K scored places of a row, C places of a chunk, D model, V vocabulary.
"""

import bisect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from llama_jax.base.errors import InputError
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.distributed import sharding
from llama_jax.distributed.platform import host_memory, memory_limit
from llama_jax.model.attention import Kernel
from llama_jax.model.config import LlamaConfig
from llama_jax.model.definition import define
from llama_jax.model.llama import RunOptions
from llama_jax.model.roles import Params
from llama_jax.reporting.progress import count_bar

SHORTEST = 256  # tokens of a row; longer rows double, so that few shapes compile
SEGMENTS = 64  # the most in a row, a bound that cuDNN's attention needs
LOGITS = 2**25  # of a chunk on a device: 128 MiB of float32
SCORES = 2**28  # of plain XLA's attention on a device: 1 GiB of float32
CPU_TOKENS, TOKENS = 4096, 16384  # of a program, where no batch size is given

Pair = tuple[Sequence[int], Sequence[int]]  # a context, and the continuation to score


class Score(NamedTuple):
    """Hold the log-likelihood of a continuation, and whether each of its tokens is the likeliest one."""

    loglikelihood: float
    is_greedy: bool


class Stopped(Exception):
    """Report that a stop came before all was scored."""


@dataclass
class Segment:
    """Hold a sequence that the model reads, and its scored places: (request, place, token that should follow)."""

    ids: tuple[int, ...]
    scored: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Return the room that a segment takes in a row, of tokens and of scored places."""
        return max(len(self.ids), len(self.scored))


class Block(NamedTuple):
    """Hold rows of segments: the model's inputs [B, T], and the places to score with their targets [B, K]."""

    input_ids: Any
    positions: Any
    segment_ids: Any
    lengths: Any
    places: Any
    targets: Any


class Scorer:
    """Score continuations with the parameters that each call gives.

    A context and its continuation are a segment of a row, side by side with others, and attend to themselves alone.
    A text of over `max_length` tokens (by default the model's positions) loses its first tokens. `rows` of the
    longest length are computed at once; None takes a fixed number of tokens. Raises InputError.
    """

    def __init__(
        self,
        config: LlamaConfig,
        run: RunOptions,
        mesh: Mesh,
        kernel: str,
        *,
        max_length: int | None = None,
        rows: int | None = None,
        disable_bar: bool | None = None,
    ):
        run = replace(run, attention=Kernel(kernel, SEGMENTS, mesh.devices.flat[0].device_kind))
        self._graphdef = define(config, run, mesh).graphdef
        self.config, self._mesh, self._disable_bar = config, mesh, disable_bar
        self.max_length = max_length or config.max_position_embeddings
        self._rows = rows
        self._heads = math.ceil(config.num_attention_heads / mesh.shape["tensor"]) if kernel == "xla" else 0
        self._is_cpu = mesh.devices.flat[0].platform == "cpu"

    def __call__(self, params: Params, pairs: Sequence[Pair], stop: Callable[[], bool] = lambda: False) -> list[Score]:
        """Return the score of each pair, in their order. They are good by `check`. Raises Stopped once `stop`
        is true, called before each block."""
        sums, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        segments = share(pairs, self.max_length)
        blocks = self._blocks(segments)
        with (
            jax.set_mesh(self._mesh),
            count_bar("scoring", sum(len(rows) for rows, _ in blocks), "row", self._disable_bar) as bar,
        ):
            outputs: list[Any] = []
            for rows, shape in blocks:
                if stop():
                    raise Stopped
                outputs.append(self._dispatch(params, rows, shape))
                sharding.keep_pace(outputs)
                bar.update(len(rows))
            for (rows, _), (logs_BK, greedy_BK) in zip(blocks, sharding.read(outputs), strict=True):
                for b, row in enumerate(rows):
                    scored = [request for segment in row for request, _, _ in segment.scored]
                    np.add.at(sums, scored, logs_BK[b, : len(scored)].astype(np.float64))
                    np.logical_and.at(greedy, scored, greedy_BK[b, : len(scored)])
        return [Score(float(s), bool(g)) for s, g in zip(sums, greedy, strict=True)]

    def check(self, pairs: Iterable[Pair]) -> None:
        """Raise InputError for a token that the embedding has no row for, and for a continuation that is too long."""
        for context, continuation in pairs:
            largest = max((*context, *continuation), default=0)
            if largest >= (rows := self.config.vocab_size):
                past = f"the tokenizer's token {largest} is past the embedding's {rows:,} rows"
                raise InputError(f"{past}; use the model's own tokenizer")
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation of {len(continuation):,} tokens; should be at most {self.max_length:,}"
                )

    def _blocks(self, segments: list[Segment]) -> list[tuple[list[list[Segment]], tuple[int, int]]]:
        """Return the rows of each block with its shape [B, T], the longest rows first."""
        by_length: dict[int, list[Segment]] = {}
        for segment in sorted(segments, key=lambda s: -s.size):
            by_length.setdefault(self.row_length(segment.size), []).append(segment)
        blocks = []
        for T, group in by_length.items():
            rows = best_fit([segment.size for segment in group], T)
            count = math.ceil(len(rows) / self.rows_of(T))
            B = self._whole(math.ceil(len(rows) / count))  # of all blocks alike, so that one shape compiles
            for first in range(0, len(rows), B):
                blocks.append(([[group[i] for i in row] for row in rows[first : first + B]], (B, T)))
        return blocks

    def row_length(self, size: int) -> int:
        """Return the length of the rows that hold a segment: 256, or doubled until it fits."""
        return SHORTEST << max(0, math.ceil(math.log2(size / SHORTEST)))

    def rows_of(self, T: int) -> int:
        """Return the number of rows of T tokens in a block. Raises InputError where one takes too much memory."""
        scores = self._heads * T * T // sharding.row_ways(self._mesh)
        room = memory_limit() or host_memory()
        if 4 * scores > room // 2:
            raise InputError(
                f"a row of {T:,} tokens takes {4 * scores / 2**30:,.0f} GiB for the scores of its attention; give "
                "--max_length, as 4096"
            )
        if self._rows:
            most = max(1, self._rows * self.row_length(self.max_length) // T)
        else:
            most = max(1, (CPU_TOKENS if self._is_cpu else TOKENS) // T)
            most = min(most, max(1, SCORES // scores)) if scores else most
        return self._whole(most)

    def _whole(self, rows: int) -> int:
        """Return a number of rows that the devices divide."""
        ways = sharding.batch_ways(self._mesh)
        return -(-rows // ways) * ways

    def _dispatch(self, params: Params, rows: list[list[Segment]], shape: tuple[int, int]) -> tuple[jax.Array, ...]:
        """Start the scoring of a block, and return the log-likelihoods and whether each token is the likeliest."""
        B, T = shape
        ids, positions, segment_ids, lengths, places, targets = (np.zeros(shape, np.int32) for _ in Block._fields)
        most = 0
        for b, row in enumerate(rows):
            start = k = 0
            for number, segment in enumerate(row, 1):
                n = len(segment.ids)
                here = slice(start, start + n)
                ids[b, here], positions[b, here] = segment.ids, np.arange(n)
                segment_ids[b, here], lengths[b, here] = number, n
                for _, place, target in segment.scored:
                    places[b, k], targets[b, k] = start + place, target
                    k += 1
                start += n
            most = max(most, k)
        ways, V = sharding.batch_ways(self._mesh), sharding.vocab_rows(self.config.vocab_size)
        C = 2 ** max(3, min(T, LOGITS * ways // (B * V)).bit_length() - 1)
        inputs = (sharding.put(self._mesh, x) for x in (ids, positions, segment_ids, lengths))
        whole = NamedSharding(self._mesh, sharding.P(sharding.BATCH, None))
        block = Block(*inputs, *(jax.device_put(x, whole) for x in (places, targets)))
        return _score(self._graphdef, C, params, block, np.int32(-(-most // C)))


def share(pairs: Sequence[Pair], max_length: int) -> list[Segment]:
    """Return the segments to compute. A sequence that begins another is not computed again: as the answers A to D of a
    question, whose contexts are equal."""
    read: list[tuple[tuple[int, ...], int, Sequence[int]]] = []
    for number, (context, continuation) in enumerate(pairs):
        whole = (*context, *continuation)[-(max_length + 1) :]
        if continuation:
            read.append((whole[:-1], number, continuation))
    segments: list[Segment] = []
    for ids, number, continuation in sorted(read, reverse=True):  # what begins another follows it
        n = len(continuation)
        last = segments[-1] if segments else None
        if last is None or last.ids[: len(ids)] != ids or len(last.scored) + n > max(SHORTEST, len(last.ids)):
            last = Segment(ids)
            segments.append(last)
        last.scored += [(number, len(ids) - n + i, token) for i, token in enumerate(continuation)]
    return segments


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Place sizes, in their order, in the fullest row with room, and return their indices by row. A row holds at most
    `capacity`, in at most SEGMENTS parts."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # room and number of the rows, ascending
    for i, size in enumerate(sizes):
        at = bisect.bisect_left(open_rows, (size, -1))
        if at == len(open_rows):
            rows.append([])
            room, row = capacity, len(rows) - 1
        else:
            room, row = open_rows.pop(at)
        rows[row].append(i)
        if room > size and len(rows[row]) < SEGMENTS:
            bisect.insort(open_rows, (room - size, row))
    return rows


@partial(jax.jit, static_argnums=(0, 1))
def _score(graphdef: Any, C: int, params: Params, block: Block, chunks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the log-likelihood of each target and whether it is the likeliest token, [B, K]. Logits are made of scored
    places alone, C of each row at once, for so many chunks."""
    model = nnx.merge(graphdef, params)
    hidden_BTD, _ = model(block.input_ids, block.positions, block.segment_ids, block.lengths)
    rows = sharding.P(sharding.BATCH, None)
    hidden_BTD = sharding.reshard(hidden_BTD, sharding.P(sharding.BATCH, None, None))

    def one(i: jax.Array, done: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        places_BC, targets_BC = (jax.lax.dynamic_slice_in_dim(x, i * C, C, 1) for x in (block.places, block.targets))
        hidden_BCD = jnp.take_along_axis(hidden_BTD, places_BC[..., None], axis=1)
        logits_BCV = model.logits(hidden_BCD)
        logits_BCV = sharding.reshard(logits_BCV, sharding.P(sharding.BATCH, None, None))
        chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        logs_BC = chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1)
        found = logs_BC, jnp.argmax(logits_BCV, axis=-1) == targets_BC
        return tuple(jax.lax.dynamic_update_slice_in_dim(a, b, i * C, 1) for a, b in zip(done, found, strict=True))  # type: ignore[return-value]

    none = (jnp.zeros(block.places.shape, kind) for kind in (jnp.float32, bool))
    return jax.lax.fori_loop(0, chunks, one, tuple(sharding.reshard(x, rows) for x in none))  # type: ignore[arg-type]


# -- Perplexity -------------------------------------------------------------------------------------------------------


def rolling_windows(tokens: Sequence[int], prefix: int, max_length: int) -> Iterator[Pair]:
    """Yield pairs that predict each token once, at most `max_length` at a time.

    A window is conditioned on the token before it, the first on `prefix`; the last one reaches back to a full window.
    """
    ids = [prefix, *tokens]
    for start in range(0, len(tokens), max_length):
        end = min(start + max_length, len(tokens))
        yield ids[max(0, end - max_length) : start + 1], ids[start + 1 : end + 1]


def prefix_token(tokenizer: Tokenizer) -> int:
    """Return the token before a text without a context: bos, else eos. Raises InputError."""
    ids = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    if not ids:
        raise InputError(f"{tokenizer.folder}: has neither a bos nor an eos token to begin a text with")
    return ids[0]


def perplexity(loglikelihood: float, text: str, tokens: int) -> dict[str, float]:
    """Return a text's perplexities by lm-eval's names, and `token_perplexity`. Words are divided by white space, bytes
    are of UTF-8."""
    counts = {"token": tokens, "word": len(re.split(r"\s+", text)), "byte": len(text.encode())}
    values = {f"{name}_perplexity": _exp(-loglikelihood / count) for name, count in counts.items()}
    return {**values, "bits_per_byte": -loglikelihood / counts["byte"] / math.log(2)}


def _exp(value: float) -> float:
    """Return e to a power, infinity where no float holds it: of a text that is a single word of thousands of bytes."""
    return math.exp(value) if value < 700 else math.inf
