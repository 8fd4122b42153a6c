"""docs/flags.md: what every flag does here, made of the flags themselves."""

from dataclasses import fields
from typing import Any

from llama_jax.setup.arguments import CONFIG, Arguments
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
    Flag,
)

# The flags of one version alone, of stanford_alpaca, and of this project; all others are of both versions.
_ORIGIN = {
    **dict.fromkeys(("model_name_or_path", "data_path", "model_max_length", "cache_dir"), ALPACA),
    **dict.fromkeys(("eval_data_path", "validation_split_percentage", "allow_pickle", "dtype", "hf_compat"), HERE),
    **dict.fromkeys(
        (
            "max_tokens_per_device",
            "remat",
            "accumulation",
            "packing",
            "attention",
            "scan_layers",
            "mesh",
            "coordinator_address",
            "num_processes",
            "process_id",
            "explain",
            "dry_run",
            "dry_run_effort",
            "show_examples",
            "config",
        ),
        HERE,
    ),
    **dict.fromkeys(("warmup_ratio", "overwrite_output_dir"), OLD),
    **dict.fromkeys(
        ("average_tokens_across_devices", "train_sampling_strategy", "eval_strategy", "eval_on_start"), NEW
    ),
}


def flags_page() -> str:
    """docs/flags.md, from the flags."""
    rows = [
        Flag(f.name, _ORIGIN.get(f.name, BOTH), None, f.default, IMPLEMENTED, f.metadata["help"])
        for f in fields(Arguments)
    ]
    rows = sorted([*rows, *FLAGS, Flag("config", HERE, None, None, IMPLEMENTED, CONFIG)])
    counts = ", ".join(f"{s} {sum(r.status == s for r in rows)}" for s in (IMPLEMENTED, ALIAS, NO_MEANING, REFUSED))
    lines = [
        "# Flags",
        "",
        "Every flag of transformers' TrainingArguments, 4.37.2's and 5.24's, of stanford_alpaca, and of this project. "
        "Made by `python -m llama_jax.command.flags_page`.",
        "",
        "An alias and a flag without meaning here are said in one line when they have another value than the default; "
        "a refused one ends the command with exit code 2 and the reason.",
        "",
        f"Flags: {counts}.",
        "",
        "| flag | versions | default | status | what it does here |",
        "|---|---|---|---|---|",
        *(_row(f"--{r.name}", r.versions, _shown(r.default), r.status, _meaning(r)) for r in rows),
        "",
        "## Values",
        "",
        "| `--optim` | versions | status | what it is here |",
        "|---|---|---|---|",
        *(
            _row(name, versions, status, f"read as `{text}`" if status == ALIAS else text)
            for name, (versions, status, text) in OPTIMIZERS.items()
        ),
        "",
        "## Differences that stay",
        "",
        *(f"- {difference}" for difference in DIFFERENCES),
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, *cells: str) -> str:
    return f"| `{name}` | " + " | ".join(cells) + " |"


def _shown(default: Any) -> str:
    return f"`{default if isinstance(default, str) and default else repr(default)}`"


def _meaning(flag: Flag) -> str:
    text = f"read as --{flag.text}" if flag.status == ALIAS else flag.text
    return f"{text} ({flag.differs})" if flag.differs else text


if __name__ == "__main__":
    print(flags_page(), end="")
