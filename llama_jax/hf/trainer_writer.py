"""Write the files beside the weights with which the HF Trainer resumes a `checkpoint-N`. This alone needs torch."""

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.base.errors import InputError
from llama_jax.hf.trainer_checkpoint import OPTIMIZER, SCHEDULER

Json = dict[str, Any]
# The state of the Trainer's own callbacks in trainer_state.json, without which 5 cannot save again.
_CONTROL = dict.fromkeys(("training_stop", "epoch_stop", "save", "evaluate", "log"), False)
CALLBACKS: Json = {"TrainerControl": {"args": {f"should_{k}": v for k, v in _CONTROL.items()}, "attributes": {}}}
WRITABLE = ("adamw_torch", "sgd", "adafactor")  # the optimizers


def import_torch(flag: str) -> Any:
    """Return torch. Raises InputError where it is not installed."""
    try:
        import torch
    except ImportError:
        raise InputError(f"{flag}: writes torch's files, and torch is not installed: pip install torch") from None
    return torch


def write_optimizer(
    folder: Path, optim: str, groups: Sequence[Sequence[str]], settings: Sequence[Json], moments: Mapping[str, Json]
) -> None:
    """Write optimizer.pt: of each group the names of its parameters and its settings, by torch's names, and by name the
    state of a parameter, whose arrays are tensors."""
    torch = import_torch("optimizer.pt")
    made = [
        {"params": [torch.nn.Parameter(torch.zeros(())) for _ in names], **values}
        for names, values in zip(groups, settings, strict=True)
    ]
    if optim == "adafactor":  # transformers' own class
        numbers, first = [], 0
        for names in groups:
            numbers.append({"params": list(range(first, first + len(names)))})
            first += len(names)
        fixed = {"eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None}
        fixed |= {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        param_groups = [{**fixed, **values, **n} for values, n in zip(settings, numbers, strict=True)]
    else:
        kind = torch.optim.AdamW if optim == "adamw_torch" else torch.optim.SGD
        param_groups = kind(made).state_dict()["param_groups"]
    state = {}
    for number, name in enumerate(name for names in groups for name in names):
        held = moments.get(name, {})
        state[number] = {key: _tensor(torch, x) if isinstance(x, np.ndarray) else x for key, x in held.items()}
    torch.save({"state": state if moments else {}, "param_groups": param_groups}, folder / OPTIMIZER)


def _tensor(torch: Any, array: np.ndarray) -> Any:
    if not (array.flags.c_contiguous and array.flags.writeable):
        array = np.array(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def write_scheduler(folder: Path, values: Json) -> None:
    """Write scheduler.pt."""
    import_torch("scheduler.pt").save(values, folder / SCHEDULER)


def write_generators(folder: Path, twister: np.random.MT19937, seed: int, names: Iterable[str]) -> None:
    """Write the generators' states under these file names: torch's on the CPU as given, the others seeded."""
    torch = import_torch("rng_state.pth")
    generator = torch.Generator()
    state = generator.get_state()
    words = state.numpy()  # as `trainer_checkpoint.read_generator` reads them
    place: Any = twister.state["state"]
    words[8:12] = np.frombuffer(np.int32(625 - place["pos"]).tobytes(), np.uint8)
    words[16:24] = np.frombuffer(np.uint64(place["pos"]).tobytes(), np.uint8)
    words[24 : 24 + 8 * 624] = np.frombuffer(place["key"].astype(np.uint64).tobytes(), np.uint8)
    generator.set_state(state)
    values = {
        "python": random.Random(seed).getstate(),
        "numpy": np.random.RandomState(seed & 0xFFFFFFFF).get_state(),
        "cpu": generator.get_state(),
    }
    for name in names:
        torch.save(values, folder / name)
