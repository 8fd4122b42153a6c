"""The reference: the real HF Trainer of whichever transformers stands first on sys.path, 4.37 or 5.

`train` makes one run on the CPU and tells all that it did. Run as a script, this file is a server: it says its versions
in one line of JSON, then answers each line of JSON on the standard input (a `spec` of `train`) with one on the standard
output, so that transformers is imported once. `Server` starts one.
"""

import contextlib
import functools
import io
import json
import math
import os
import sys
import traceback
from collections import deque
from pathlib import Path
from typing import Any

import nearest
from reference import Process, environment

ROOT = Path(__file__).resolve().parent.parent
QUIET = ["--use_cpu", "True", "--report_to", "none", "--disable_tqdm", "True"]


class Server:
    """This file as a process. `compat` is "4.37" or "5"; `versions` maps the packages to what it imported. `more` are
    variables, as torchrun sets them for a rank."""

    def __init__(self, compat: str, more: dict[str, str] | None = None):
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
        self._process = Process(__file__, environment(compat) | quiet | (more or {}))
        self.close = self._process.close

    @functools.cached_property
    def versions(self) -> dict[str, str]:
        """Waits until the server has started."""
        return self._process.read()

    def train(self, spec: dict[str, Any]) -> dict[str, Any]:
        """`train` over there; its paths should be absolute."""
        assert self.versions
        return self._process.ask(spec)


class _Examples:
    """Records by number; `number` finds one again by its list of ids, which collators pass on as it is."""

    def __init__(self, path: str):
        self._records = json.loads(Path(path).read_text())
        self.number = {id(record["input_ids"]): i for i, record in enumerate(self._records)}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self._records[i]


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """One run. Its `spec`:

    - `argv`: flags for HfArgumentParser and TrainingArguments, `--output_dir` left out; `QUIET` is added
    - `model`: an HF folder; `data`, `eval_data` (may be absent): JSON files of records of `input_ids` and `labels`,
      perhaps with an `attention_mask`
    - `output_dir`
    - `report_to`: platforms, of which 5's command line takes one alone
    - `new_tokens` (0): how many rows stanford_alpaca's resize adds to the vocabulary
    - `quantization`: keywords of BitsAndBytesConfig
    - `peft`: keywords of PEFT's LoraConfig; the adapter alone is trained, and drawn under the seed of `argv`; its
      folder is `adapter` in `output_dir`
    - `nearest` (False): whether bitsandbytes' 8-bit optimizers take the nearest code (`nearest.py`)
    - `pad_token_id` (0): what pads the ids; `attn` ("sdpa"): the attention implementation; `threads` (1): torch's
    - `resume`: a checkpoint to resume from; the answer is then of the updates after it

    The answer is {"error": what the Trainer said} where it refuses or fails; else, for each update,

    - `micro_losses`: the loss of each of its micro-batches as the Trainer adds them to the log, NaN as it is
    - `losses`: their sums over what is finite (a micro-batch without trained tokens is NaN and has no gradient)
    - `grad_norms`: before clipping, summed in float64
    - `rates`: the learning rate that the optimizer used
    - `order`: the numbers of the examples of each of its micro-batches

    and of the whole run `state` (trainer_state.json; of several ranks, the first's alone), `checkpoints` (the folders
    left), `printed` (the log's lines), `weights` (the path of a safetensors file), `seconds` of `Trainer.train`.
    """
    printed = io.StringIO()
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            done = _train(spec)
    except SystemExit:  # argparse has said why
        return {"error": said.getvalue().strip().rpartition("\n")[2]}
    except Exception as e:
        return {"error": f"{type(e).__name__}: {e}", "traceback": traceback.format_exc()}
    return {**done, "printed": [line for line in printed.getvalue().splitlines() if line.startswith("{")]}


def _train(spec: dict[str, Any]) -> dict[str, Any]:
    import time

    import torch
    import transformers
    from accelerate.state import AcceleratorState, GradientState
    from safetensors.torch import save_file

    AcceleratorState._reset_state(True)  # they outlive a run, and remember an epoch that was left half-way
    GradientState._reset_state()
    torch.set_num_threads(spec.get("threads", 1))
    if transformers.__version__.startswith("4.37"):  # whose rng_state.pth the torch of its time unpickles whole
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    if spec.get("nearest"):
        nearest.install()
    output_dir = Path(spec["output_dir"])
    output_dir.mkdir(exist_ok=True)
    parser = transformers.HfArgumentParser(transformers.TrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(output_dir), *QUIET, *map(str, spec["argv"])])
    args.report_to = spec.get("report_to", args.report_to)
    data = _Examples(spec["data"])
    eval_data = _Examples(spec["eval_data"]) if spec.get("eval_data") else None
    keywords = {}
    if "quantization" in spec:
        keywords["quantization_config"] = transformers.BitsAndBytesConfig(**spec["quantization"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        spec["model"], attn_implementation=spec.get("attn", "sdpa"), **keywords
    )
    if new_tokens := spec.get("new_tokens", 0):
        model.resize_token_embeddings(model.config.vocab_size + new_tokens)
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            rows = embedding.weight.data
            rows[-new_tokens:] = rows[:-new_tokens].mean(0, keepdim=True)
    if "peft" in spec:
        import peft

        torch.manual_seed(args.seed)
        model = peft.get_peft_model(model, peft.LoraConfig(**spec["peft"]))
    collated: deque[tuple[list[int], Any]] = deque()  # a loader is a batch ahead; resumed, 4.37 begins past epochs too

    def collate(records: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        numbers = [data.number.get(id(record["input_ids"])) for record in records]
        width = max(len(record["input_ids"]) for record in records)

        def padded(values: list[list[int]], pad: int) -> torch.Tensor:
            return torch.tensor([v + [pad] * (width - len(v)) for v in values])

        ids = padded([r["input_ids"] for r in records], spec.get("pad_token_id", 0))
        if None not in numbers:
            collated.append(([n for n in numbers if n is not None], ids))
        return {
            "input_ids": ids,
            "labels": padded([r["labels"] for r in records], -100),
            "attention_mask": padded([r.get("attention_mask", [1] * len(r["input_ids"])) for r in records], 0),
        }

    losses: list[float] = []
    order: list[list[int]] = []
    norms: list[float] = []
    updates: list[dict[str, Any]] = []

    def note_norm() -> None:
        """The first one asked for in an update is that before clipping."""
        if len(norms) == len(updates):
            grads = [p.grad.double() for p in model.parameters() if p.grad is not None]
            norms.append(math.sqrt(sum(float((g * g).sum()) for g in grads)))

    def before_update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        note_norm()
        rate = optimizer.param_groups[0]["lr"]
        updates.append({"micro_losses": losses.copy(), "rate": float(rate), "order": order.copy()})
        losses.clear()
        order.clear()

    class Recorder(transformers.Trainer):
        def create_optimizer(self, *a: Any, **k: Any) -> Any:
            super().create_optimizer(*a, **k)
            self.optimizer.register_step_pre_hook(before_update)
            return self.optimizer

        def training_step(self, *a: Any, **k: Any) -> torch.Tensor:
            ids = (a[1] if len(a) > 1 else k["inputs"])["input_ids"]
            numbers, seen = collated.popleft()
            while not torch.equal(seen, ids):
                numbers, seen = collated.popleft()
            loss = super().training_step(*a, **k)
            losses.append(float(loss))
            order.append(numbers)
            return loss

    trainer = Recorder(model, args, collate, train_dataset=data, eval_dataset=eval_data)
    clip = trainer.accelerator.clip_grad_norm_

    def clip_grad_norm_(*a: Any, **k: Any) -> Any:
        note_norm()
        return clip(*a, **k)

    trainer.accelerator.clip_grad_norm_ = clip_grad_norm_
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=spec.get("resume"))
    seconds = time.monotonic() - started
    trainer.save_state()
    if "peft" in spec:
        model.save_pretrained(output_dir / "adapter")
    weights = output_dir / "final.safetensors"
    tied = ["lm_head.weight"] if model.config.tie_word_embeddings else []
    save_file({k: v.contiguous() for k, v in model.state_dict().items() if k not in tied}, str(weights))
    return {
        "micro_losses": [u["micro_losses"] for u in updates],
        "losses": [sum(x for x in u["micro_losses"] if math.isfinite(x)) for u in updates],
        "grad_norms": norms,
        "rates": [u["rate"] for u in updates],
        "order": [u["order"] for u in updates],
        "state": json.loads((output_dir / "trainer_state.json").read_text()) if args.process_index == 0 else None,
        "checkpoints": sorted(p.name for p in output_dir.glob("checkpoint-*")),
        "weights": str(weights),
        "seconds": seconds,
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is written there
    import accelerate
    import torch
    import transformers

    versions = {module.__name__: module.__version__ for module in (transformers, accelerate, torch)}
    print(json.dumps(versions), file=answers)
    for line in sys.stdin:
        print(json.dumps(train(json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
