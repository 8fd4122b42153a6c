"""Read how a model's `generation_config.json` draws tokens, by the rules of transformers' `generate`."""

from typing import Any

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


def read_sampling(generation: dict[str, Any], source: str, temperature: float | None = None) -> Sampling:
    """Return how tokens are chosen: as `generation` has it, or at `temperature`, 0 for greedily.

    The other values are those of `generation`, then transformers': `top_k` is 50 where tokens are drawn. `source` names
    the file in messages. Raises InputError.
    """

    def number(key: str, default: float, low: float, high: float) -> float:
        value = default if generation.get(key) is None else generation[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise InputError(f"{source}: {key} {value!r} should be a number from {low} to {high}")
        return value

    penalty = number("repetition_penalty", 1.0, 1e-3, 1e3)
    if temperature is None:
        temperature = number("temperature", 1.0, 0.0, 1e6) if generation.get("do_sample") is True else 0.0
    if temperature == 0:
        return Sampling(repetition_penalty=float(penalty))
    return Sampling(
        temperature=float(temperature),
        top_k=int(number("top_k", 50, 0, 2**31)),
        top_p=float(number("top_p", 1.0, 0.0, 1.0)),
        min_p=float(number("min_p", 0.0, 0.0, 1.0)),
        repetition_penalty=float(penalty),
    )


def describe(generation: dict[str, Any], sampling: Sampling, source: str) -> list[str]:
    """Return the lines for the user: how tokens are chosen where not plainly greedily, and the keys not obeyed."""
    lines = []
    if sampling != Sampling():
        values = {**sampling._asdict(), "temperature": sampling.temperature or "0 (greedy)"}
        idle = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        shown = ", ".join(f"{key} {value}" for key, value in values.items() if value != idle.get(key))
        lines.append(f"tokens are chosen by {shown} ({source})")
    others = [k for k, idle in _NOT_OBEYED.items() if generation.get(k) not in (None, idle)]
    if others:
        lines.append(f"warning: {source}: {', '.join(others)}: no effect here, unlike in transformers' generate")
    return lines
