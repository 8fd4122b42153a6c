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


def configure(folder: str) -> dict[str, Any] | str:
    """What `config.json` says of the rotation and of the type, or why it is refused."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except ValueError as e:
        return str(e)
    is_new = not hasattr(config, "rope_theta")  # 5 has `rope_parameters` only
    if is_new:
        rope = config.rope_parameters
    else:
        rope = {"rope_theta": config.rope_theta, **(config.rope_scaling or {})}
        rope = {"rope_type": rope.pop("type", "default"), **rope}
    return {
        "dtype": str(config.dtype if is_new else config.torch_dtype),
        "rope": {key: value for key, value in rope.items() if value is not None and key != "type"},
    }


def logits(case: dict[str, Any]) -> list[list[float]]:
    """Of the model in `folder` for each of the `ids`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case["folder"])
    with torch.no_grad():
        return model(torch.tensor([case["ids"]])).logits[0].float().tolist()


if __name__ == "__main__":
    serve(tokenize, configure, logits)
