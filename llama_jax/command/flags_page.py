"""Write docs/flags.md from the flags themselves: `python -m llama_jax.command.flags_page > docs/flags.md`."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from llama_jax.setup.arguments import Arguments
from llama_jax.setup.flags import (
    ALIAS,
    ALPACA,
    BOTH,
    DIFFERENCES,
    FLAGS,
    HERE,
    IMPLEMENTED,
    NEW,
    NO_MEANING,
    OLD,
    OPTIMIZERS,
    REFUSED,
    SCRIPTS,
    Flag,
)

# The origin of each implemented flag that is not in both versions of TrainingArguments.
_ORIGIN = {
    name: origin
    for origin, names in {
        ALPACA: "model_name_or_path data_path model_max_length cache_dir",
        OLD: "warmup_ratio overwrite_output_dir logging_dir",
        NEW: "average_tokens_across_devices train_sampling_strategy eval_strategy eval_on_start project "
        "trackio_space_id trackio_bucket_id trackio_static_space_id",
        SCRIPTS: "tokenizer_name dataset_config_name",
        "PEFT": "use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_modules_to_save ensure_weight_tying "
        "use_rslora use_dora lora_bias init_lora_weights adapter_name_or_path load_in_4bit load_in_8bit "
        "bnb_4bit_quant_type use_bnb_nested_quant",
        HERE: "eval_data_path eval_tasks eval_tasks_limit validation_split_percentage skip_bad_records world_size "
        "allow_pickle allow_nonfinite on_nonfinite max_bad_updates skip_loss_spikes adam_moments_dtype "
        "offload_optimizer export_only "
        "dtype fp8 hf_compat "
        "max_tokens_per_device remat accumulation packing attention scan_layers compiler_options gradient_sum_dtype "
        "mesh coordinator_address num_processes "
        "process_id watchdog_seconds compare_with profile_updates sample_prompts "
        "explain dry_run dry_run_effort show_examples config",
    }.items()
    for name in names.split()
}


def flags_page() -> str:
    """Return docs/flags.md."""
    implemented = [
        Flag(f.name, _ORIGIN.get(f.name, BOTH), None, f.default, IMPLEMENTED, f.metadata["help"])
        for f in fields(Arguments)
    ]
    rows = sorted([*implemented, *FLAGS])
    counts = ", ".join(f"{s} {sum(r.status == s for r in rows)}" for s in (IMPLEMENTED, ALIAS, NO_MEANING, REFUSED))
    lines = [
        "# Flags",
        "",
        "The table holds every flag of transformers' TrainingArguments (4.37.2 and 5.24), of stanford_alpaca, of "
        "this project, and those of the Trainer's example scripts that name data. `python train_jax.py --help` shows "
        "the common flags in groups.",
        "",
        "- implemented: has an effect; for a flag of the Trainer, the Trainer's.",
        "- alias: read as the other flag that the table names. A line at the start of the run names it.",
        "- no meaning: accepted and ignored, for the reason in the table. A line at the start of the run names it.",
        "- refused: ends the command with exit code 2, the reason and the fix.",
        "",
        "An alias, a flag without meaning and a refused flag pass silently with their default value.",
        "",
        f"Flags: {counts}.",
        "",
        "| flag | versions | default | status | effect here |",
        "|---|---|---|---|---|",
        *(_row(f"`--{r.name}`", r.versions, _shown(r.default), r.status, _meaning(r)) for r in rows),
        "",
        "## Values",
        "",
        "| `--optim` | versions | status | effect here |",
        "|---|---|---|---|",
        *_optimizer_rows(),
        "",
        "The error line of a refused optimizer names an implemented one to use instead.",
        "",
        "## Differences that stay",
        "",
        *(f"- {difference}" for difference in DIFFERENCES),
        "",
        "This page is made by `python -m llama_jax.command.flags_page > docs/flags.md`.",
    ]
    return "\n".join(lines) + "\n"


def _optimizer_rows() -> Iterator[str]:
    """Yield a row for each accepted optimizer, and a row for all refused ones of the same versions."""
    refused: dict[str, list[str]] = {}
    for name, (versions, status, text) in OPTIMIZERS.items():
        if status == REFUSED:
            refused.setdefault(versions, []).append(f"`{name}`")
        else:
            yield _row(f"`{name}`", versions, status, f"read as `{text}`" if status == ALIAS else text)
    for versions, names in refused.items():
        yield _row(", ".join(names), versions, REFUSED, "not there")


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(default: Any) -> str:
    return f"`{default if isinstance(default, str) and default else repr(default)}`"


def _meaning(flag: Flag) -> str:
    text = f"read as --{flag.text}" if flag.status == ALIAS else flag.text
    return f"{text} ({flag.differs})" if flag.differs else text


if __name__ == "__main__":
    print(flags_page(), end="")
