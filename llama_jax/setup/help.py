"""Format `--help` from the fields of the flags, without transformers' parser, whose import takes over 1 s."""

import textwrap
from collections.abc import Iterable
from dataclasses import Field
from typing import Any

from llama_jax.setup.flags import ALIAS, FLAGS, NO_MEANING, REFUSED

WIDTH = 100
COLUMN = 35  # of the text beside a flag
EXAMPLE = """\
Fine-tune a LLaMA: a Hugging Face folder in, a Hugging Face folder out.

Example:
  python train_jax.py --model_name_or_path HF_DIR --data_path alpaca_data.json --output_dir output \\
    --bf16 True --num_train_epochs 3 --learning_rate 2e-5 --lr_scheduler_type cosine
"""
# The first flag of each group -> its title.
GROUPS = {
    "model_name_or_path": "Model and data",
    "num_train_epochs": "Training",
    "bf16": "Devices and memory",
    "output_dir": "Saving, evaluation and logging",
    "config": "Config files and checks before a run",
}
COMMON = frozenset(
    """
    model_name_or_path data_path model_max_length
    num_train_epochs per_device_train_batch_size gradient_accumulation_steps learning_rate lr_scheduler_type
    warmup_ratio weight_decay
    use_peft
    bf16 mesh remat use_cpu
    output_dir save_steps save_total_limit resume_from_checkpoint eval_strategy eval_data_path
    logging_steps
    config explain dry_run show_examples
    """.split()
)


def help_page(flags: Iterable[Field[Any]], everything: bool) -> str:
    """Return the common flags with a line each, or `everything`: all texts, and the flags that are not implemented."""
    lines = [EXAMPLE.rstrip()]
    for flag in flags:
        if flag.name in GROUPS:
            lines += ["", f"{GROUPS[flag.name]}:"]
        if everything or flag.name in COMMON:
            lines += _entry(flag.name, _text(flag, everything))
    if not everything:
        return "\n".join([*lines, "", "--help all lists every flag, docs/flags.md describes them.", ""])
    lines += ["", "Read as another flag:"]
    for alias in FLAGS:
        if alias.status == ALIAS:
            lines += _entry(alias.name, f"--{alias.text}")
    lines += ["", "Accepted without effect, for the reason given:"]
    reasons: dict[str, list[str]] = {}
    for other in FLAGS:
        if other.status == NO_MEANING:
            reasons.setdefault(other.text, []).append(f"--{other.name}")
    for reason, names in reasons.items():
        lines += [*_wrapped(f"{', '.join(names)}:", 2), *_wrapped(reason, 6)]
    lines += ["", "Refused:"]
    for refused in FLAGS:
        if refused.status == REFUSED:
            lines += _entry(refused.name, refused.text)
    return "\n".join(
        [
            *lines,
            "",
            "A flag may be shortened to a unique prefix; --no_NAME is --NAME False where the default is True.",
            "docs/flags.md holds these texts as a table, and the values of --optim.",
            "",
        ]
    )


def _text(flag: Field[Any], everything: bool) -> str:
    text = flag.metadata["help"]
    if not everything:
        text = text.partition(";")[0]
    elif any(value not in text for value in flag.metadata.get("choices", ())):
        text += f"; values: {', '.join(flag.metadata['choices'])}"
    return text if flag.default in (None, "") else f"{text} (default: {flag.default})"


def _entry(name: str, text: str) -> list[str]:
    """Return a flag and its text beside it, or below it where the name is long."""
    head = f"  --{name}"
    lines = _wrapped(text, COLUMN)
    if len(head) + 2 > COLUMN:
        return [head, *lines]
    return [head.ljust(COLUMN) + lines[0].lstrip(), *lines[1:]]


def _wrapped(text: str, indent: int) -> list[str]:
    space = " " * indent
    return textwrap.wrap(text, WIDTH, initial_indent=space, subsequent_indent=space, break_on_hyphens=False)
