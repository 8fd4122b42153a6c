"""The reference for tokenizers: the real AutoTokenizer of transformers, of 4.37 in the process that `Server` runs.

Run as a script, this file answers each line of JSON on the standard input, the arguments of `describe`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from reference import Process, environment

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# stanford_alpaca's.
DEFAULTS = {"pad_token": "[PAD]", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}


class Server:
    """`describe` in a process of transformers 4.37."""

    def __init__(self) -> None:
        self._process = Process(__file__, environment("4.37") | {"TRANSFORMERS_VERBOSITY": "critical"})
        self.close = self._process.close

    def describe(self, folder: Path, texts: list[str]) -> dict[str, Any]:
        return self._process.ask([str(folder), texts])


def describe(folder: str, texts: list[str]) -> dict[str, Any]:
    """Special tokens and ids of texts, of the tokenizer as stanford_alpaca opens it; "alpaca": after its rule too."""
    from transformers import AutoTokenizer

    fast = (Path(folder) / "tokenizer.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=fast)
    described = _describe(tokenizer, texts)
    missing = {key: text for key, text in DEFAULTS.items() if getattr(tokenizer, key) is None}
    tokenizer.add_special_tokens(missing)
    return {**described, "alpaca": _describe(tokenizer, texts)}


def _describe(tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    special = {key: getattr(tokenizer, key) for key in SPECIAL}
    return {
        "length": len(tokenizer),
        "special": {key: None if text is None else str(text) for key, text in special.items()},
        "ids": [tokenizer(text)["input_ids"] for text in texts],
        "added": dict(tokenizer.get_added_vocab()),
    }


if __name__ == "__main__":
    answers = sys.stdout
    sys.stdout = sys.stderr  # for what transformers prints
    for line in sys.stdin:
        try:
            answer = describe(*json.loads(line))
        except Exception as e:
            answer = {"error": repr(e)}
        print(json.dumps(answer), file=answers, flush=True)
