"""Quantize matrices on the host as they are read, bit-equal to bitsandbytes 0.50 on the CPU.

transformers casts a weight to the type of loading before it quantizes, and leaves the head and tied embeddings alone.
NF4's nested statistics subtract a mean, which torch adds up in an order that depends on the device and, beyond 2
million weights, on the number of CPU threads. The order here is that of a single thread.

Letters: O outputs, I inputs, G groups of BLOCK inputs, H half a group.
"""

from functools import cache, reduce
from itertools import product

import numpy as np

from llama_jax.base.errors import InputError
from llama_jax.model.quantized import BLOCK, HALF, INT8, LEVELS, NF4, STATISTICS, Quantization, statistic_levels

TILE = (512, 2 * BLOCK)  # outputs and inputs quantized at once: the temporaries stay in a core's cache


def quantize(weight: np.ndarray, quantization: Quantization, name: str) -> NF4 | INT8:
    """Quantize a matrix [O, I] of the type of loading. Raises InputError."""
    if quantization.bits == 8:
        return quantize_int8(weight, name)
    return quantize_nf4(weight, quantization.nested, name)


def quantize_nf4(weight: np.ndarray, nested: bool, name: str) -> NF4:
    """Quantize a matrix [O, I] of float32, float16 or bfloat16, tile by tile; BLOCK divides I. Raises InputError."""
    (outputs, inputs), (rows, columns) = weight.shape, TILE
    codes = np.empty((inputs // BLOCK, HALF, outputs), np.uint8)
    absmax = np.empty((outputs, inputs // BLOCK), np.float32)
    for o, i in product(range(0, outputs, rows), range(0, inputs, columns)):
        packed, largest = _quantize_tile(weight[o : o + rows, i : i + columns])
        groups = slice(i // BLOCK, i // BLOCK + packed.shape[1])
        codes[groups, :, o : o + rows], absmax[o : o + rows, groups] = packed.transpose(1, 2, 0), largest
    _check_finite(absmax, name, "float32")
    if not nested:
        return NF4(codes, np.ascontiguousarray(absmax.T))
    offset = _mean(absmax.reshape(-1))
    nested_codes, scales = _quantize_statistics(absmax.reshape(-1) - offset)
    return NF4(codes, np.ascontiguousarray(nested_codes.reshape(absmax.shape).T), scales, np.asarray(offset))


def _quantize_tile(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return packed codes [O, G, H] and absmax [O, G]. NumPy's searchsorted takes ten times the 15 comparisons."""
    values = weight.astype(np.float32, order="C").reshape(-1, BLOCK)
    absmax = np.abs(values).view(np.int32).max(axis=1).view(np.float32)  # integers: same order, 0.6 of the time
    with np.errstate(invalid="ignore"):  # infinite weights are refused by their absmax
        values *= (1 / np.maximum(absmax, np.float32(1e-38)))[:, None]
    codes, above = np.zeros(values.size, np.uint8), np.empty(values.size, bool)
    for bound in (LEVELS[:-1] + LEVELS[1:]) / 2:
        codes += np.greater(values.reshape(-1), bound, out=above).view(np.uint8)
    halves = codes.reshape(len(weight), -1, 2, HALF)
    return halves[:, :, 0] << 4 | halves[:, :, 1], absmax.reshape(len(weight), -1)


def _mean(x: np.ndarray) -> np.float32:
    """Return the mean, added in the order of a thread of torch: 4 x 8 lanes, and 16 terms a sum on 4 levels."""
    lanes, zero = 8 if len(x) >= 8 else 1, np.float32(0)
    vectors = x[: len(x) // lanes * lanes].reshape(-1, lanes)
    rows, last = np.split(vectors, [len(vectors) // 4 * 4])
    rows, levels = rows.reshape(-1, 4, lanes), []
    for _ in range(3):
        groups, rest = np.split(rows, [len(rows) // 16 * 16])
        levels.append(sum(rest, np.zeros((4, lanes), np.float32)))
        rows = reduce(np.add, groups.reshape(-1, 16, 4, lanes).swapaxes(0, 1))
    levels.append(sum(rows, np.zeros((4, lanes), np.float32)))
    first, *others = reduce(np.add, levels)
    ends = sum(others, sum(last, first))
    return np.float32(sum([*x[vectors.size :], *ends], zero) / np.float32(len(x)))


def _quantize_statistics(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 8-bit codes of a flat array, and its largest magnitudes by STATISTICS; the last may cover fewer."""
    blocks = np.pad(values, (0, -len(values) % STATISTICS)).reshape(-1, STATISTICS)
    scales = np.abs(blocks).max(axis=1)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # 0 / 0 has code 0
        unit = np.clip(np.nan_to_num(blocks * (1 / scales)[:, None], nan=-1), -1, 1)
    # bitsandbytes rounds to a grid of 65536 points by a fused multiply-add, and quantizes the point.
    point = (((unit + np.float32(1)) / 2).astype(np.float64) * 65535 + 0.5).astype(np.float32).astype(np.uint16)
    return _codes_of_grid()[point].reshape(-1)[: len(values)], scales


@cache
def _codes_of_grid() -> np.ndarray:
    levels = statistic_levels()
    grid = np.float32(-1) + np.float32(2) * np.arange(65536, dtype=np.float32) / np.float32(65535)
    return np.searchsorted((levels[:-1] + levels[1:]) / 2, grid).astype(np.uint8)


def quantize_int8(weight: np.ndarray, name: str) -> INT8:
    """Quantize a matrix [O, I] by outputs, rounded to float16 first, as bitsandbytes does. Raises InputError."""
    codes, absmax = np.empty(weight.shape, np.int8), np.empty(len(weight), np.float32)
    rows = max(1, TILE[0] * TILE[1] // weight.shape[1])
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        for o in range(0, len(weight), rows):
            values = weight[o : o + rows].astype(np.float16).astype(np.float32)
            absmax[o : o + rows] = largest = np.abs(values).max(axis=1)
            values *= (1 / largest * np.float32(127))[:, None]  # torch divides by way of the reciprocal
            codes[o : o + rows] = np.nan_to_num(np.rint(values), posinf=0, neginf=0)
    _check_finite(absmax, name, "float16")
    return INT8(codes, absmax)


def _check_finite(absmax: np.ndarray, name: str, dtype: str) -> None:
    if not np.isfinite(absmax).all():
        raise InputError(f"{name}: the matrix holds weights that are NaN or infinite in {dtype}; repair the checkpoint")
