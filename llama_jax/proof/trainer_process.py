"""Prepare a model, or make updates of it with the real Trainer: a program of its own, without JAX.

python -m llama_jax.proof.trainer_process reads a JSON object on the standard input, and writes one into the file
that its `answer` names.
"""

import contextlib
import json
import math
import sys
from collections import deque
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from llama_jax.proof.torch_layers import in_float64, keep_layers

IGNORED = -100


def prepare(spec: dict[str, Any]) -> dict[str, Any]:
    """Write the HF folder `model` as the folder `prepared`, in float32: its first `layers` layers (null: all), and
    `new_tokens` rows of the vocabulary more, the mean of the others as in stanford_alpaca."""
    config = transformers.AutoConfig.from_pretrained(spec["model"])
    if layers := spec["layers"]:
        keep_layers(config, layers)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(spec["model"], config=config, dtype=torch.float32)
    if new := spec["new_tokens"]:
        model.resize_token_embeddings(model.config.vocab_size + new, mean_resizing=False)
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            rows = embedding.weight.data
            rows[-new:] = rows[:-new].mean(0, keepdim=True)
    model.save_pretrained(spec["prepared"])
    return {}


class Examples:
    """Hold the examples of a job, parsed as they are used. `number` finds one by its list of ids, which the Trainer
    passes on as it is."""

    def __init__(self, path: str):
        self._lines = Path(path).read_text().splitlines()
        self._records: dict[int, dict[str, Any]] = {}
        self.number: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i not in self._records:
            self._records[i] = json.loads(self._lines[i])
            self.number[id(self._records[i]["input_ids"])] = i
        return self._records[i]


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Make the updates of a run with the Trainer.

    `spec` has `model`, `examples` (JSONL of input_ids and labels), `flags` of TrainingArguments, `exact` (all in
    float64), `peft` (LoraConfig's keywords, or null), and `initial` (or null) and `weights`, the files to write before
    and after.
    The answer has for each update the loss, the logged learning rate, the gradient's norm before clipping and the
    numbers of its examples.
    """
    args = transformers.TrainingArguments(**spec["flags"])
    examples = Examples(spec["examples"])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        spec["model"], attn_implementation="eager", dtype=torch.float32
    )
    if spec["peft"]:
        import peft

        torch.manual_seed(args.seed)
        model = peft.get_peft_model(model, peft.LoraConfig(**spec["peft"]))
    if spec["exact"]:
        model = model.double()

    def save(path: str) -> None:
        state = peft.get_peft_model_state_dict(model) if spec["peft"] else model.state_dict()
        if not spec["peft"] and model.config.tie_word_embeddings:
            state.pop("lm_head.weight")
        # A clone: PEFT saves a tied head beside its embedding, and safetensors refuses tensors that share memory.
        save_file({name: value.clone().contiguous() for name, value in state.items()}, path)

    if spec["initial"]:
        save(spec["initial"])
    collated: deque[list[int]] = deque()  # the loader is a batch ahead of the training
    done: list[dict[str, Any]] = []
    current: dict[str, Any] = {"loss": 0.0, "examples": []}

    def collate(records: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        collated.append([examples.number[id(record["input_ids"])] for record in records])
        width = max(len(record["input_ids"]) for record in records)

        def padded(name: str, fill: int) -> torch.Tensor:
            return torch.tensor([r[name] + [fill] * (width - len(r[name])) for r in records])

        mask = torch.tensor([[1] * (n := len(r["input_ids"])) + [0] * (width - n) for r in records])
        return {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED), "attention_mask": mask}

    def norm() -> float:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return math.hypot(*(float(torch.linalg.vector_norm(grad, dtype=torch.float64)) for grad in grads))

    class Recorder(transformers.Trainer):
        def create_optimizer(self, *a: Any, **k: Any) -> Any:
            optimizer: Any = super().create_optimizer(*a, **k)
            optimizer.register_step_pre_hook(before_update)
            return optimizer

        def training_step(self, *a: Any, **k: Any) -> torch.Tensor:
            learned = (a[1]["labels"][:, 1:] != IGNORED).any()
            with in_float64(torch) if spec["exact"] else contextlib.nullcontext():
                loss = super().training_step(*a, **k)
            if learned:  # else the loss is NaN
                current["loss"] += float(loss)
            current["examples"] += collated.popleft()
            return loss

    def before_update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if "norm" not in current:  # without clipping
            current["norm"] = norm()
        done.append(dict(current))
        current.clear()
        current.update(loss=0.0, examples=[])

    trainer = Recorder(model, args, collate, train_dataset=examples)
    clip = trainer.accelerator.clip_grad_norm_

    def clip_grad_norm_(*a: Any, **k: Any) -> Any:
        current["norm"] = norm()
        return clip(*a, **k)

    trainer.accelerator.clip_grad_norm_ = clip_grad_norm_
    trainer.train()
    save(spec["weights"])
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    return {"updates": [update | {"rate": rate} for update, rate in zip(done, rates, strict=True)]}


def main() -> None:
    """Answer the object on the standard input, in the file that its `answer` names."""
    transformers.utils.logging.set_verbosity_error()
    spec = json.load(sys.stdin)
    answer = (prepare if "prepared" in spec else train)(spec)
    Path(spec["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
