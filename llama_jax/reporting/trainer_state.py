"""The log and `trainer_state.json` in the HF Trainer's schema."""

from pathlib import Path
from typing import Any

from llama_jax.files import write_json


class TrainerState:
    """What the HF Trainer keeps of a run. `compat` is "4.37" or "5": the rounding and the keys of that version."""

    def __init__(
        self,
        compat: str,
        *,
        max_steps: int,
        num_train_epochs: int,
        train_batch_size: int,
        logging_steps: int,
        save_steps: int,
    ):
        self.compat = compat
        self.values: dict[str, Any] = {
            "best_metric": None,
            "best_model_checkpoint": None,
            "epoch": 0.0,
            "eval_steps": 500,
            "global_step": 0,
            "is_hyper_param_search": False,
            "is_local_process_zero": True,
            "is_world_process_zero": True,
            "log_history": [],
            "logging_steps": logging_steps,
            "max_steps": max_steps,
            "num_input_tokens_seen": 0,
            "num_train_epochs": num_train_epochs,
            "save_steps": save_steps,
            "total_flos": 0,
            "train_batch_size": train_batch_size,
            "trial_name": None,
            "trial_params": None,
        }
        if compat == "5":
            self.values |= {"best_global_step": None, "stateful_callbacks": {}}

    def resume(self, saved: dict[str, Any]) -> None:
        """Go on from the state that a checkpoint kept; what the flags say of the run's length stays."""
        kept = ("log_history", "global_step", "epoch", "total_flos", "num_input_tokens_seen")
        self.values |= {key: saved[key] for key in kept}

    def at(self, step: int, epoch: float, flos: float) -> None:
        self.values |= {"global_step": step, "epoch": self._epoch(epoch), "total_flos": flos}

    def log(self, values: dict[str, float], epoch: float, step: int) -> dict[str, Any]:
        """Append an entry to the log and return it as it is printed."""
        entry = {**values, "epoch": self._epoch(epoch)}
        if self.compat == "4.37" and "loss" in entry:
            entry["loss"] = round(entry["loss"], 4)
        self.values["log_history"].append({**entry, "step": step})
        if self.compat == "5":
            return {key: f"{v:.4g}" if isinstance(v, float) else v for key, v in entry.items()}
        return entry

    def _epoch(self, epoch: float) -> float:
        return round(epoch, 2) if self.compat == "4.37" else epoch

    def save(self, folder: Path) -> None:
        write_json(folder / "trainer_state.json", self.values)
