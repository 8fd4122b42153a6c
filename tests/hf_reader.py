"""The reference for the folders that we write: what the real transformers reads of them, 4.37 or 5.

Of whichever stands first on sys.path. Run as a script, this file is a server of its functions; `Server` starts one.
"""

import warnings
from typing import Any

from reference import Process, environment, serve


class Server:
    """The functions below in a process of transformers 4.37."""

    def __init__(self) -> None:
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
        self._process = Process(__file__, environment("4.37") | quiet)
        self.close = self._process.close

    def ask(self, function: str, argument: Any) -> Any:
        return self._process.ask([function, argument])


def tokenize(case: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer of `folder`, `fast` or not: its class, special tokens, and the ids of `texts`."""
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(case["folder"], use_fast=case["fast"])
    special = {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return {
        "class": type(tokenizer).__name__,
        "special": special,
        "special_ids": {key: tokenizer.convert_tokens_to_ids(token) for key, token in special.items() if token},
        "ids": [tokenizer(text)["input_ids"] for text in case["texts"]],
        "decoded": [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) for text in case["texts"]],
    }


if __name__ == "__main__":
    serve(tokenize)
