"""Convert an HF folder (or a .gguf file) to a Flax checkpoint, and back with --to_hf."""

import argparse

from llama_jax.base.bucket import as_path
from llama_jax.base.errors import InputError, Parser
from llama_jax.base.files import make_output_dir
from llama_jax.base.secrets import without_query
from llama_jax.reporting.progress import say

_ELSEWHERE = ("to_hf", "merge_adapter", "dtype", "verify", "tokenizer_name", "allow_pickle", "allow_nonfinite")


def main(argv: list[str]) -> int:
    """Run `convert_torch_to_flax.py` and return its exit code. Raises InputError."""
    args = parse(argv)
    # JAX is imported once the flags are good, so that --help answers at once.
    from llama_jax.distributed.platform import set_up_jax
    from llama_jax.distributed.processes import refuse_several
    from llama_jax.hf.convert import merge_adapter, to_flax, to_hf
    from llama_jax.hf.peft import read_adapter
    from llama_jax.hf.source import Source, numpy_dtype, refuse_other_kind

    refuse_several("convert_torch_to_flax.py")
    set_up_jax(use_cpu=True)
    if args.to_hf_trainer:
        from llama_jax.run.hand_back import hand_back

        given = [flag for flag in _ELSEWHERE if getattr(args, flag)]
        if given:
            raise InputError(
                f"--{given[0]}: does not go with --to_hf_trainer, which writes a run's checkpoint as it is"
            )
        folder = as_path(args.output_dir)
        hand_back(as_path(args.model_name_or_path), folder)
        say(f"done: go on from it in the HF Trainer, trainer.train(resume_from_checkpoint={str(folder)!r})")
        return 0
    dtype = numpy_dtype(args.dtype) if args.dtype else None
    bad = args.allow_nonfinite
    source = Source(args.model_name_or_path, args.allow_pickle, tokenizer=args.tokenizer_name, allow_nonfinite=bad)
    for note in source.notes:
        say(note)
    if args.merge_adapter and (args.to_hf or source.is_flax):
        raise InputError("--merge_adapter: takes an HF folder as --model_name_or_path, the adapter's base model")
    if args.to_hf and not source.is_flax:
        raise InputError(f"{source.folder}: --to_hf takes a folder made by this program; this one is HF's already")
    if source.is_flax and not args.to_hf:
        raise InputError(f"{source.folder}: is in this program's format already; --to_hf makes an HF folder of it")
    folder = as_path(args.output_dir)
    read = [source.folder, *(as_path(name) for name in (args.model_name_or_path, args.merge_adapter) if name)]
    if folder.resolve() in [path.resolve() for path in read]:
        raise InputError(f"--output_dir {folder}: is the folder that is read; name another")
    if args.merge_adapter and args.verify:
        raise InputError("--verify: compares tensors that are only copied; leave it out with --merge_adapter")
    adapter = read_adapter(as_path(args.merge_adapter), source.config, bad) if args.merge_adapter else None
    refuse_other_kind(folder, "converted" if args.to_hf or args.merge_adapter else "Flax")
    make_output_dir(folder)
    flags = {k: without_query(v) if isinstance(v, str) else v for k, v in vars(args).items() if v}
    if adapter:
        merge_adapter(source, *adapter, folder, dtype, flags, allow_nonfinite=bad)
        say(f"done: {args.model_name_or_path} with {args.merge_adapter} -> {folder}")
        return 0
    if args.to_hf:
        different = to_hf(source, folder, dtype, args.verify, bad, flags)
    else:
        different = to_flax(source, folder, dtype, args.verify, bad)
    if different:
        say(f"error: {len(different)} tensors differ after writing: {', '.join(different[:4])}")
        return 1
    say(f"done: {args.model_name_or_path} -> {folder}")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the flags of a command line. Raises InputError."""
    parser = Parser(prog="convert_torch_to_flax.py", description=__doc__)
    parser.add_argument(
        "--model_name_or_path",
        required=True,
        help="HF folder, hub name or .gguf file; with --to_hf a Flax folder or a run's checkpoint-N, with "
        "--to_hf_trainer the latter",
    )
    parser.add_argument("--tokenizer_name", help="folder or hub name of another tokenizer than the model's own")
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--to_hf", action="store_true", help="write an HF folder from a Flax one or a checkpoint")
    parser.add_argument(
        "--to_hf_trainer",
        action="store_true",
        help="write a run's checkpoint-N as one of the HF Trainer, with the optimizer's state (needs torch)",
    )
    parser.add_argument("--merge_adapter", help="write an HF folder that has this PEFT folder's adapter in its weights")
    parser.add_argument("--dtype", help="type to store (float32), or with --to_hf to write (that of the original)")
    parser.add_argument("--verify", action="store_true", help="read everything back and compare SHA-256 digests")
    parser.add_argument("--allow_pickle", action="store_true", help="read pytorch_model*.bin")
    parser.add_argument("--allow_nonfinite", action="store_true", help="read and write weights with NaN or Inf")
    return parser.parse_args(argv)
