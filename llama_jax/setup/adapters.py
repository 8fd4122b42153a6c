"""Read the adapter that the flags ask for: PEFT's settings, from TRL's flags or from a PEFT folder."""

from typing import Any

from llama_jax.base.bucket import as_path
from llama_jax.base.errors import InputError
from llama_jax.hf.peft import Adapter, read_adapter, read_settings
from llama_jax.hf.tensor import Tensor
from llama_jax.model.config import LlamaConfig
from llama_jax.model.quantized import Quantization
from llama_jax.setup.arguments import Arguments

# Flags by the names of PEFT's LoraConfig.
SETTINGS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "ensure_weight_tying": "ensure_weight_tying",
    "lora_bias": "bias",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "init_lora_weights": "init_lora_weights",
}


def choose_adapter(args: Arguments, config: LlamaConfig) -> tuple[Adapter | None, dict[str, Tensor]]:
    """Return the adapter to train and the tensors that it starts from; None and {} for full fine-tuning.

    Without `--adapter_name_or_path` there are no tensors. Raises InputError.
    """
    if args.adapter_name_or_path:
        adapter, tensors = read_adapter(as_path(args.adapter_name_or_path), config, args.allow_nonfinite)
        if adapter.vocab_size:
            raise InputError(
                f"--adapter_name_or_path {args.adapter_name_or_path}: its embedding has {adapter.vocab_size} rows, the "
                f"model with its tokenizer {config.vocab_size}; give the tokenizer of the adapter: --tokenizer_name "
                f"{args.adapter_name_or_path}"
            )
        return adapter, tensors
    if not args.use_peft:
        return None, {}
    values: dict[str, Any] = {setting: getattr(args, flag) for flag, setting in SETTINGS.items()}
    values["target_modules"] = _modules(args.lora_target_modules)
    values["modules_to_save"] = _names(args.lora_modules_to_save)
    values["init_lora_weights"] = {"true": True, "false": False}.get(
        args.init_lora_weights.lower(), args.init_lora_weights
    )
    values |= {"task_type": "CAUSAL_LM", "peft_type": "LORA", "base_model_name_or_path": args.model_name_or_path}
    return read_settings(values, config, "the --lora flags"), {}


def choose_quantization(args: Arguments) -> Quantization | None:
    """Return the format of the frozen projections, None for plain weights. Raises InputError."""
    bits = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(args, name)]
    if len(bits) > 1:
        raise InputError("--load_in_4bit True and --load_in_8bit True: a model is kept in one format; give one of them")
    if bits and not (args.use_peft or args.adapter_name_or_path):
        raise InputError(f"--{bits[0]} True: quantized weights cannot be trained; add --use_peft True")
    if args.bnb_4bit_quant_type != "nf4":
        raise InputError(
            f"--bnb_4bit_quant_type {args.bnb_4bit_quant_type}: 4 bits are held as nf4 only; leave the flag out"
        )
    if args.use_bnb_nested_quant and not args.load_in_4bit:
        raise InputError("--use_bnb_nested_quant True: belongs to --load_in_4bit True; add it, or leave this out")
    return Quantization(4 if args.load_in_4bit else 8, args.use_bnb_nested_quant) if bits else None


def _names(words: list[str] | None) -> list[str] | None:
    """Return the names in a flag's words: separated by spaces or commas, in brackets and quotes or not."""
    joined = " ".join(words or ()).replace(",", " ")
    return [name for word in joined.split() if (name := word.strip("[]'\""))] or None


def _modules(words: list[str] | None) -> list[str] | str | None:
    """Return `--lora_target_modules` as PEFT takes it: names, or a single regular expression, or all-linear."""
    if words and len(words) == 1 and (words[0] == "all-linear" or any(c in words[0] for c in r".*\|+^$(")):
        return words[0]
    return _names(words)


def refuse_without_adapter(args: Arguments) -> None:
    """Refuse flags of adapters in a run that has none: they would change nothing. Raises InputError."""
    given = [flag for flag in SETTINGS if getattr(args, flag) != Arguments.__dataclass_fields__[flag].default]
    if given and args.adapter_name_or_path:
        raise InputError(
            f"--{given[0]}: the adapter of --adapter_name_or_path has its own settings (adapter_config.json); "
            "leave it out"
        )
    if given and not args.use_peft:
        raise InputError(f"--{given[0]}: all parameters are trained without adapters; add --use_peft True")
