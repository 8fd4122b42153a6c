"""Keep the log and write `trainer_state.json` in the HF Trainer's schema."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_jax.base.errors import plain
from llama_jax.base.files import write_json
from llama_jax.reporting.progress import say


class TrainerState:
    """Hold the HF Trainer's state of a run. `compat`, "4.37" or "5", selects that version's rounding and keys.

    `on_log` gets each entry of the log without its step, as the Trainer's `on_log` does.
    """

    def __init__(
        self,
        compat: str,
        *,
        max_steps: int,
        num_train_epochs: int,
        train_batch_size: int,
        logging_steps: int,
        eval_steps: int,
        save_steps: int,
        greater_is_better: bool = False,
    ):
        self.compat, self.greater_is_better = compat, greater_is_better
        self.on_log: Callable[[dict[str, Any]], None] = lambda entry: None
        self.values: dict[str, Any] = {
            "best_metric": None,
            "best_model_checkpoint": None,
            "epoch": 0.0,
            "eval_steps": eval_steps,
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

    def resume(self, saved: dict[str, Any], output_dir: Path, wants_best: bool) -> None:
        """Restore progress and log from a checkpoint's state; the run's length stays as the flags set it.
        A best checkpoint that is missing from `output_dir` is dropped, which is said to a run that `wants_best`; its
        metric is kept."""
        kept = ("log_history", "global_step", "epoch", "total_flos", "num_input_tokens_seen")
        best = ("best_metric", "best_model_checkpoint", "best_global_step")
        self.values |= {key: saved[key] for key in (*kept, *best) if key in saved}
        if not (path := self.values["best_model_checkpoint"]):
            return
        name = Path(path).name
        if not (re.fullmatch(r"checkpoint-[0-9]{1,18}", name) and (output_dir / name).is_dir()):
            if wants_best:
                missing = f"{plain(str(path))}, the best checkpoint so far, is not in {plain(str(output_dir))}"
                say(f"warning: {missing}: --load_best_model_at_end chooses among later ones")
            self.values["best_model_checkpoint"] = None

    def at(self, step: int, epoch: float, flos: float, tokens_seen: int) -> None:
        """Set the progress after update `step`."""
        now = {"global_step": step, "epoch": epoch, "total_flos": flos, "num_input_tokens_seen": tokens_seen}
        self.values |= now

    def log(self, values: dict[str, float], more: dict[str, Any] | None = None) -> dict[str, Any]:
        """Append an entry to the log and return its printed form; `more` follows the epoch."""
        entry = {**values, "epoch": self.values["epoch"], **(more or {})}
        if self.compat == "4.37":
            digits = {"loss": 4, "epoch": 2}
            entry = {key: round(v, digits[key]) if key in digits else v for key, v in entry.items()}
        self.values["log_history"].append({**entry, "step": self.values["global_step"]})
        self.on_log(entry)
        if self.compat == "5":
            return {key: f"{v:.4g}" if isinstance(v, float) else v for key, v in entry.items()}
        return entry

    def _better(self, metric: float) -> bool:
        best = self.values["best_metric"]
        return metric > best if self.greater_is_better else metric < best

    def evaluated(self, metric: float, saves: bool) -> bool:
        """Record an evaluation's metric and return whether it is the best so far; 4.37 compares in `saved` instead.
        `saves` is whether the run saves checkpoints."""
        if self.compat == "4.37":
            return False
        if self.values["best_metric"] is None:
            self.values["best_metric"] = float("-inf") if self.greater_is_better else float("inf")
        if not self._better(metric):
            return False
        self.values["best_metric"] = metric
        if saves:
            self.values["best_global_step"] = self.values["global_step"]
        return True

    def saved(self, output_dir: Path, metric: float | None) -> None:
        """Update the best checkpoint before this step's is written; `metric` is from this step's evaluation, if any.

        4.37 compares metrics here. 5 only sets the path of the best step's folder, if it exists.
        """
        values, step = self.values, self.values["global_step"]
        if self.compat == "5":
            best = values["best_global_step"]
            if best and (best == step or (output_dir / f"checkpoint-{best}").is_dir()):
                values["best_model_checkpoint"] = str(output_dir / f"checkpoint-{best}")
        elif metric is not None:
            first = values["best_metric"] is None or values["best_model_checkpoint"] is None
            if first or self._better(metric):
                values["best_metric"] = metric
                values["best_model_checkpoint"] = str(output_dir / f"checkpoint-{step}")

    @property
    def best_step(self) -> int | None:
        """Return the step of the best checkpoint, if any."""
        path = self.values["best_model_checkpoint"]
        return int(Path(path).name.rpartition("-")[2]) if path else None

    def save(self, folder: Path) -> None:
        write_json(folder / "trainer_state.json", self.values)
