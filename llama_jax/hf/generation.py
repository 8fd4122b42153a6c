"""Read how a model's `generation_config.json` draws tokens, by the rules of transformers' `generate`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llama_jax.base.errors import InputError
from llama_jax.model.generate import Sampling

# The keys that an old config.json may hold in its place.
KEYS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p"),
    "repetition_penalty",
)
# Keys that change the answer there and have no effect here, with the values at which they do nothing.
_NOT_OBEYED: dict[str, Any] = {
    **{"num_beams": 1, "num_beam_groups": 1, "no_repeat_ngram_size": 0, "typical_p": 1.0, "top_h": None},
    **{"epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "penalty_alpha": 0.0, "guidance_scale": 1.0, "min_length": 0},
    **{"min_new_tokens": 0, "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None},
    **{"forced_bos_token_id": None, "forced_eos_token_id": None, "exponential_decay_length_penalty": None},
    **{"sequence_bias": None, "force_words_ids": None, "constraints": None, "stop_strings": None, "max_time": None},
    **{"watermarking_config": None, "dola_layers": None},
}


# The numbers of a `Sampling`: transformers' default where tokens are drawn, least and greatest.
_RANGES: dict[str, tuple[float, float, float]] = {
    "temperature": (1.0, 0.0, 1e6),
    "top_k": (50, 0, 2**31),
    "top_p": (1.0, 0.0, 1.0),
    "min_p": (0.0, 0.0, 1.0),
    "repetition_penalty": (1.0, 1e-3, 1e3),
}
_OF_DRAWING = "top_k", "top_p", "min_p"
_COLDEST = 1e-30  # the least temperature of drawing: logits of 1e8 over a smaller one overflow float32
MOST_NEW_TOKENS = 1 << 20  # a cache of 1e9 slots made jax wait for ever on a CPU


def check_new_tokens(count: Any, name: str) -> None:
    """Refuse what is no greatest number of new tokens; `name` is its name in the message. Raises InputError."""
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or not 1 <= count <= MOST_NEW_TOKENS:
        raise InputError(f"{name} {count!r} should be from 1 to {MOST_NEW_TOKENS}")


def read_sampling(generation: dict[str, Any], source: str, **given: float | None) -> Sampling:
    """Return how tokens are chosen: by the values `given`, then those of `generation`, then transformers'.

    `source` names the file in messages. Tokens are drawn where `generation` says so, or a value of drawing is given;
    at the temperature 0 they are the likeliest. Raises InputError.
    """
    given = {key: value for key, value in given.items() if value is not None}

    def number(key: str) -> float:
        default, low, high = _RANGES[key]
        where, value = (f"--{key}", given[key]) if key in given else (f"{source}: {key}", generation.get(key))
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise InputError(f"{where} {value!r} should be a number from {low} to {high}")
        return value

    penalty, drawing = float(number("repetition_penalty")), [key for key in _OF_DRAWING if key in given]
    draws = "temperature" in given or generation.get("do_sample") is True or drawing
    temperature = float(number("temperature")) if draws else 0.0
    if temperature == 0:
        if drawing:
            raise InputError(f"--{drawing[0]} chooses among tokens to draw, and none is drawn at the temperature 0")
        return Sampling(repetition_penalty=penalty)
    if temperature < _COLDEST:
        where = "--temperature" if "temperature" in given else f"{source}: temperature"
        raise InputError(f"{where} {temperature!r} should be 0 for the likeliest token, or {_COLDEST} or above")
    top_k, top_p, min_p = map(number, _OF_DRAWING)
    return Sampling(temperature, int(top_k), float(top_p), float(min_p), penalty)


def read_stops(generation: dict[str, Any], source: str) -> list[str]:
    """Return the texts that end an answer by `generation`. Raises InputError."""
    value = generation.get("stop_strings") or []
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise InputError(f"{source}: stop_strings {value!r} should be a text or a list of texts")
    return stops


def describe(generation: dict[str, Any], sampling: Sampling, source: str, obeyed: Sequence[str] = ()) -> list[str]:
    """Return the lines for the user: how tokens are chosen where not plainly greedily, and the keys not obeyed."""
    lines = []
    if sampling != Sampling():
        values = {**sampling._asdict(), "temperature": sampling.temperature or "0 (greedy)"}
        idle = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        shown = ", ".join(f"{key} {value}" for key, value in values.items() if value != idle.get(key))
        lines.append(f"tokens are chosen by {shown} ({source})")
    others = [k for k, idle in _NOT_OBEYED.items() if k not in obeyed and generation.get(k) not in (None, idle)]
    if others:
        lines.append(f"warning: {source}: {', '.join(others)}: no effect here, unlike in transformers' generate")
    return lines
