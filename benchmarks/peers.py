"""Run the peers of `speed.py`: the HF Trainer, and torch's own loop over the same HF model, with or without PEFT.

Each peer makes random weights on the device in float32 and trains with AdamW and clipping, matmuls in bf16. Both return
`work.measured` of their updates, on the first rank. torch is imported only by a peer's process: ours does not need it.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from make_model import raw_config
from work import lengths_of, measured

from llama_jax.model.lora import PROJECTIONS, Lora, Rank

CUDA = torch.cuda.is_available()
WAYS, LOCAL = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
DEVICE = torch.device("cuda", LOCAL) if CUDA else torch.device("cpu")


def run(args: argparse.Namespace) -> dict | None:
    """Run the peer that `--only` names. With several GPUs, torchrun starts this command once for each."""
    if torch.cuda.device_count() > 1 and "RANK" not in os.environ:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "gpu"]
        os.execv(sys.executable, [*torchrun, *sys.argv])
    peer = next((f for f in (fsdp, peft) if args.only.startswith(f.__name__)), trainer)
    result = peer(args)
    return None if LOCAL else result


def _make_model(raw: dict) -> transformers.LlamaForCausalLM:
    if CUDA:
        torch.cuda.set_device(DEVICE)
    config = transformers.LlamaConfig(**{k: v for k, v in raw.items() if k != "model_type"})
    with DEVICE:
        return transformers.LlamaForCausalLM(config).float()


def _told(
    args: argparse.Namespace,
    raw: dict,
    lengths: np.ndarray,
    done: list[float],
    order: list,
    started: float,
    lora: Lora | None = None,
):
    return {
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "devices": WAYS,
        **measured(raw, lengths, done, order, WAYS, lora),
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0,
        "compile_s": done[0] - started,
        "detail": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }


def trainer(args: argparse.Namespace) -> dict:
    """Time the installed transformers' HF Trainer with our flags; on several devices with its --fsdp.

    Its optimizer is its default. It checkpoints gradients where sequences are whole.
    """
    raw = raw_config(args.shape, args.layers)
    lengths, batch, accumulation = lengths_of(args, WAYS)
    rng = np.random.default_rng(0)

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return len(lengths)

        def __getitem__(self, i):
            return {"length": int(lengths[i]), "index": i}

    seen: list[int] = []

    def collate(items):
        seen.extend(item["index"] for item in items)
        longest = max(item["length"] for item in items)
        rows = [rng.integers(0, raw["vocab_size"], item["length"]) for item in items]
        pad = np.stack([np.pad(row, (0, longest - len(row)), constant_values=-1) for row in rows])
        ids, labels = np.where(pad < 0, 0, pad), np.where(pad < 0, -100, pad)
        return {k: torch.tensor(v) for k, v in (("input_ids", ids), ("labels", labels), ("attention_mask", pad >= 0))}

    model = _make_model(raw)
    done: list[float] = []
    deadline = time.monotonic() + args.seconds

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, _, state, control, **__):
            if CUDA:
                torch.cuda.synchronize()
            done.append(time.monotonic())
            if WAYS == 1:  # several ranks would stop at different updates
                control.should_training_stop = len(done) >= 6 and time.monotonic() > deadline

    checkpointed = not args.work.startswith("alpaca")
    sharded: dict[str, Any] = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    sharded["activation_checkpointing"] = checkpointed
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            bf16=True,
            max_steps=args.updates + 4,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            learning_rate=2e-5,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            gradient_checkpointing=checkpointed and WAYS == 1,
            torch_compile=args.only == "compiled",
            use_cpu=not CUDA,
            tf32=True if CUDA else None,
            fsdp="full_shard auto_wrap" if WAYS > 1 else None,
            fsdp_config=sharded if WAYS > 1 else None,
        )
        started = time.monotonic()
        run = transformers.Trainer(model, arguments, train_dataset=Data(), data_collator=collate, callbacks=[Clock()])
        run.train()
    # Assume that the other ranks' examples are as long as this rank's.
    per_update = batch * accumulation
    order = [np.tile(seen[k * per_update : (k + 1) * per_update], WAYS) for k in range(len(done))]
    return _told(args, raw, lengths, done, order, started)


def _time_updates(
    args: argparse.Namespace,
    raw: dict,
    lengths: np.ndarray,
    rows: int,
    *,
    loss: Callable[[torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    lora: Lora | None = None,
) -> dict:
    """Time updates of `rows` whole sequences of random tokens on each rank; `loss` takes their ids [rows, length]."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    rng = np.random.default_rng(LOCAL)
    done: list[float] = []
    started = time.monotonic()
    for _ in range(args.updates + 4):
        ids = torch.tensor(rng.integers(0, raw["vocab_size"], (rows, lengths[0])), device=DEVICE)
        loss(ids).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if CUDA:
            torch.cuda.synchronize()
        done.append(time.monotonic())
        if len(done) == 1 and CUDA:
            torch.cuda.reset_peak_memory_stats()  # leave out the whole float32 model of the start
    return _told(args, raw, lengths, done, [np.arange(rows * WAYS)] * len(done), started, lora)


def fsdp(args: argparse.Namespace) -> dict:
    """Time torch's FSDP2 as torchtitan lays it out.

    Each layer is compiled, gathered in bf16, its gradient reduced in float32. AdamW is fused, the residual stream bf16.
    On one device FSDP2 is the compiled model alone. "fsdp_checkpointed" keeps only each layer's input. Sequences are
    whole.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if args.work.startswith("alpaca"):
        sys.exit("this peer takes whole sequences only")
    raw = raw_config(args.shape, args.layers)
    lengths, rows, _ = lengths_of(args, WAYS)
    alone: dict[str, Any] = {} if WAYS > 1 else {"rank": 0, "world_size": 1, "store": torch.distributed.HashStore()}
    torch.distributed.init_process_group("nccl" if CUDA else "gloo", **alone)
    torch.set_float32_matmul_precision("high")
    model = _make_model(raw)
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layers = model.model.layers
    for i, layer in enumerate(layers):
        if args.only == "fsdp_checkpointed":
            layer = checkpoint_wrapper(layer, preserve_rng_state=False)
        layers[i] = torch.compile(layer)
        fully_shard(layers[i], mp_policy=precision)
    fully_shard(model, mp_policy=precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0, fused=True)

    @torch.compile
    def loss_of(logits, targets):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return loss_of(model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:])

    told = _time_updates(args, raw, lengths, rows, loss=loss, optimizer=optimizer)
    torch.distributed.destroy_process_group()
    return told


def peft(args: argparse.Namespace) -> dict:
    """Time PEFT's LoRA, r=16 on all linear layers, on one device: a base in bf16, adapters in float32 under autocast.

    The loop is torch's own, AdamW is fused. "peft_compiled" compiles the model, "peft_checkpointed" keeps only each
    layer's input. Sequences are whole.
    """
    from peft import LoraConfig, get_peft_model

    if args.work.startswith("alpaca"):
        sys.exit("this peer takes whole sequences only")
    raw = raw_config(args.shape, args.layers)
    lengths, rows, _ = lengths_of(args, 1)
    torch.set_float32_matmul_precision("high")
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    base = _make_model(raw).bfloat16()
    if args.only == "peft_checkpointed":
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(base, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=True)
    forward = torch.compile(model) if args.only == "peft_compiled" else model

    def loss(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return forward(input_ids=ids, labels=ids, use_cache=False).loss

    places = ((i, projection) for i in range(raw["num_hidden_layers"]) for projection in PROJECTIONS)
    lora = Lora(tuple((place, Rank(16, 2.0)) for place in places))
    return _time_updates(args, raw, lengths, rows, loss=loss, optimizer=optimizer, lora=lora)
