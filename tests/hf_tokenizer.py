"""The reference for special tokens: the real AutoTokenizer of transformers 4.37, which `Server` runs beside ours.

Run as a script, this file answers each line of JSON on the standard input, a folder, with `special_tokens` of it.
"""

import json
import sys
from pathlib import Path

from reference import Process, environment

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class Server:
    """`special_tokens` in a process of transformers 4.37."""

    def __init__(self) -> None:
        self._process = Process(__file__, environment("4.37") | {"TRANSFORMERS_VERBOSITY": "critical"})
        self.close = self._process.close

    def special_tokens(self, folder: str) -> dict[str, str | int | None]:
        return self._process.ask(folder)


def special_tokens(folder: str) -> dict[str, str | int | None]:
    """The special tokens' texts, and the tokenizer's length, as stanford_alpaca opens it."""
    from transformers import AutoTokenizer

    fast = not (Path(folder) / "tokenizer.model").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=fast)
    texts = {key: getattr(tokenizer, key) for key in SPECIAL}
    return {**{key: None if text is None else str(text) for key, text in texts.items()}, "length": len(tokenizer)}


if __name__ == "__main__":
    answers = sys.stdout
    sys.stdout = sys.stderr  # for what transformers prints
    for line in sys.stdin:
        print(json.dumps(special_tokens(json.loads(line))), file=answers, flush=True)
