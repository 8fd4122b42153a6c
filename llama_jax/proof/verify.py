"""Verify a copied folder by its manifest: digests, tokens, and logits under transformers, with PEFT for adapters.

No data, flags or jax device of the run are needed. Torch holds one layer in memory at a time.

Letters: N tokens of all prompts, V vocabulary, C chosen columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from llama_jax.base.errors import InputError, one_line
from llama_jax.hf.digests import Entry, digest_of_all
from llama_jax.hf.manifest import (
    ADAPTER_CONFIG,
    WEIGHTS,
    Manifest,
    deciding_files,
    digest_tensors,
    file_digest,
    read_manifest,
)
from llama_jax.hf.readers import open_safetensors
from llama_jax.hf.source import Source
from llama_jax.hf.tensor import Tensor
from llama_jax.proof.bounds import bound_of
from llama_jax.proof.sample import Sample
from llama_jax.proof.tokens import first_difference
from llama_jax.proof.torch_layers import FLOAT32, Reference, import_torch, saved_name
from llama_jax.proof.verdict import Row, bounded
from llama_jax.proof.walk import worst_token

TENSORS, FILES, BASE, TOKENS, LOGITS = "tensors", "files", "base model", "tokens", "logits, float32"


def verify(folder: Path, base: str | None, allow_pickle: bool, show: Callable[[Sequence[Row]], None]) -> list[Row]:
    """Return the rows of a folder; `show` is called with each section's. `base` replaces the name of an adapter's base
    model, whose files may be pickled under `allow_pickle`. Raises InputError."""
    manifest = read_manifest(folder)
    import_torch()
    for flag, given in (("model_name_or_path", base), ("allow_pickle", allow_pickle)):
        if given and not manifest.base:
            raise InputError(f"--{flag}: has no meaning with --verify of a whole model; leave it out")
    source = _open_base(base or manifest.base["name"], allow_pickle) if manifest.base else None
    rows: list[Row] = []

    def add(more: list[Row]) -> None:
        rows.extend(more)
        show(more)

    add(compare_tensors(folder, manifest))
    add(compare_files(folder, manifest))
    if source:
        add([compare_base(manifest, source)])
    add(compare_tokens(folder, manifest))
    add(compare_logits(folder, manifest, source))
    return rows


def _open_base(name: str, allow_pickle: bool) -> Source:
    """Open an adapter's base model. Raises InputError, for models that torch does not read too."""
    try:
        source = Source(name, allow_pickle)
    except InputError as e:
        raise InputError(f"{e} (the adapter's base model; --model_name_or_path names another place)") from None
    if source.is_flax or source.gguf:
        kind = "a Flax folder, whose tensors have no digests" if source.is_flax else "a .gguf file"
        raise InputError(
            f"{name}: the adapter's base model is {kind}, and torch computes from HF folders: give the HF folder that "
            "it was made of, or one made of it, by --model_name_or_path HF_DIR"
        )
    return source


def compare_tensors(folder: Path, manifest: Manifest) -> list[Row]:
    """Return a row for each tensor that is another, missing or not in the manifest, and one for all the others.

    A file of weights that the manifest does not name fails a row, though transformers may pass over it."""
    rows: list[Row] = []
    tensors: dict[str, Tensor] = {}
    named = {entry["file"] for entry in manifest.tensors.values()}
    for path in sorted({path for pattern in WEIGHTS for path in folder.glob(pattern) if not path.is_dir()}):
        if path.name not in named:
            rows.append(_failed(TENSORS, path.name, _unnamed(path.name, manifest)))
            continue
        try:
            for name, tensor in open_safetensors(path).items():
                if name in tensors:
                    rows.append(_failed(TENSORS, name, f"is in both {tensors[name].file} and {path.name}"))
                tensors[name] = tensor
        except InputError as e:
            rows.append(_failed(TENSORS, path.name, str(e)))
    found, written = digest_tensors(tensors), manifest.tensors
    for name in sorted(found.keys() | written.keys()):
        if problem := _difference(written.get(name), found.get(name)):
            rows.append(_failed(TENSORS, name, problem))
    held = {name: entry for name, entry in found.items() if entry == written.get(name)}
    note = f"SHA-256 over all {digest_of_all(held)}" if not rows else ""
    return [*rows, *([Row(TENSORS, f"{len(held):,} tensors", None, None, True, note)] if held else [])]


def _unnamed(name: str, manifest: Manifest) -> str:
    """Return the problem with a file of weights that the manifest does not name, by its readers."""
    others = "transformers passes over it, and other programs may read it in the place of the manifest's"
    if manifest.base is None and name == "model.safetensors":
        others = "transformers reads it in the place of the manifest's shards"
    elif manifest.base is None and name.startswith("adapter_model"):
        others = "with an adapter_config.json transformers loads it, too"
    return f"is a file of weights that the manifest does not name: {others}; remove it"


def _difference(written: Entry | None, found: Entry | None) -> str:
    """Return how a tensor differs from its entry in the manifest, "" where it does not."""
    if written is None:
        return "is not in the manifest"
    if found is None:
        return f"is missing; {written['file']} had it"
    for key, problem in (("shape", "has another shape"), ("dtype", "is of another type"), ("file", "is elsewhere")):
        if found[key] != written[key]:
            return f"{problem}: {found[key]}, not {written[key]}"
    return "" if found["sha256"] == written["sha256"] else "has other bytes"


def _failed(section: str, name: str, problem: str) -> Row:
    return Row(section, name, None, None, False, problem)


def compare_files(folder: Path, manifest: Manifest) -> list[Row]:
    """Return a row for each other file that decides results."""
    rows: list[Row] = []
    present = {path.relative_to(folder).as_posix() for path in deciding_files(folder)}
    for name in sorted(present | manifest.files.keys()):
        problem = "is not in the manifest"
        if name in manifest.files:
            problem = _other_bytes(folder / name, manifest.files[name]) if name in present else "is missing"
        if name == ADAPTER_CONFIG and not manifest.base:
            problem = "is in the folder of a whole model: transformers loads its adapter in the model's place or on top"
        rows.append(Row(FILES, name, None, None, not problem, problem))
    return rows


def _other_bytes(path: Path, digest: str) -> str:
    """Return how a file differs from its digest in the manifest, "" where it does not."""
    try:
        return "" if file_digest(path) == digest else "has other bytes"
    except OSError as e:
        return f"cannot be read: {e.strerror}"


def compare_base(manifest: Manifest, source: Source) -> Row:
    """Return the row of an adapter's base model, by the digest of all its tensors."""
    assert manifest.base is not None
    expected, name = manifest.base["sha256"], str(source.folder)
    if expected is None:
        why = "the adapter was trained on a Flax folder, whose tensors have no digest here; its logits decide"
        return Row(BASE, name, None, None, None, why)
    found = digest_of_all(digest_tensors(source.tensors))
    problem = f"its tensors are not those of {manifest.base['name']}: SHA-256 over all {found}, not {expected}"
    return Row(BASE, name, None, None, found == expected, "" if found == expected else problem)


def compare_tokens(folder: Path, manifest: Manifest) -> list[Row]:
    """Return a row for the ids of each prompt by AutoTokenizer."""
    if any(prompt.text is None for prompt in manifest.prompts):
        return [Row(TOKENS, "ids of the prompts", None, None, None, "the prompts are ids: no tokenizer was exported")]
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer(prompt.text)["input_ids"] for prompt in manifest.prompts]
    except Exception as e:  # of many classes
        return [_failed(TOKENS, "AutoTokenizer", f"cannot read the folder: {one_line(e)}")]
    rows = []
    for prompt, theirs in zip(manifest.prompts, ids, strict=True):
        difference = first_difference("the manifest", prompt.ids, theirs, str).replace(" here", " in the manifest")
        rows.append(Row(TOKENS, f"ids of {prompt.text!r}", None, None, not difference, difference))
    return rows


def compare_logits(folder: Path, manifest: Manifest, base: Source | None) -> list[Row]:
    """Return the rows of the logits after each token of the prompts.

    The error of the chosen columns is relative in their norm, as in a certificate (`bounds`). Over the whole vocabulary
    errors are relative to the largest magnitude: the largest magnitudes of two programs differ by no more than their
    logits do, and the likeliest token of one is at most twice as far below the likeliest of the other. Of weights with
    NaN or Inf, logits are not finite after the same tokens, and the finite ones are compared.
    """
    chosen, likeliest, largest = (np.concatenate([logits[part] for logits in manifest.logits]) for part in range(3))
    examples = [(np.asarray(prompt.ids, np.int32),) * 2 for prompt in manifest.prompts]
    sample = Sample(examples, packed=False, compat="5")
    try:
        reference = _open_reference(folder, manifest, base)
        theirs, exact = map(sample.of_padded, reference.whole_logits(sample.ids, sample.mask))
    except Exception as e:  # of many classes: the folder may be damaged in any way
        return [_failed(LOGITS, "chosen columns", f"cannot be computed: {one_line(e)}")]
    if exact.shape[1] <= max(*manifest.columns, likeliest.max()):
        return [
            _failed(
                LOGITS,
                "chosen columns",
                f"the model has {exact.shape[1]:,} rows of the vocabulary, and the manifest names more",
            )
        ]

    columns, layers = manifest.columns, reference.layers
    finite, whole = (np.isfinite(part) for part in (theirs[:, columns], theirs))
    rows = _compare_finite(np.isfinite(chosen), finite, np.isfinite(largest), whole.all(-1))
    if rows and rows[0].holds is False:
        return rows

    if (tokens := finite.all(-1)).any():
        error, rounding, worst = worst_token(
            *(part[tokens] for part in (chosen, theirs[:, columns], exact[:, columns]))
        )
        off = np.abs(chosen - theirs[:, columns])[tokens].max()
        note = f"{len(columns)} of {exact.shape[1]:,}, after {tokens.sum()} tokens; largest difference {off:.2e}"
        row = bounded(LOGITS, "chosen columns", error, bound_of(FLOAT32, rounding, layers), note)
        if not row.holds:
            prompt, token = (int(at[tokens][worst]) for at in np.nonzero(sample.mask))
            row = replace(row, note=f"{note}, worst at prompt {prompt + 1}, token {token}")
        rows.append(row)
    if not (tokens := whole.all(-1)).any():
        return rows

    likeliest, largest, theirs, exact = (part[tokens] for part in (likeliest, largest, theirs, exact))
    scale = np.abs(exact).max(-1)
    bound = bound_of(FLOAT32, float((np.abs(theirs - exact).max(-1) / scale).max()), layers)
    error = float((np.abs(largest - np.abs(theirs).max(-1)) / scale).max())
    rows.append(bounded(LOGITS, "largest magnitudes", error, bound))
    top = np.take_along_axis(exact, likeliest[:, None], -1)[:, 0]
    same = float((likeliest == theirs.argmax(-1)).mean())
    error = float(((exact.max(-1) - top) / scale).max())
    rows.append(bounded(LOGITS, "likeliest tokens", error, 2 * bound, f"the same after {same:.1%}"))
    return rows


def _compare_finite(
    chosen: np.ndarray, their_chosen: np.ndarray, whole: np.ndarray, their_whole: np.ndarray
) -> list[Row]:
    """Return the row of the logits that are not finite, none where all are: by chosen column [N, C], and by token [N]
    whether its whole vocabulary is finite."""
    if all(part.all() for part in (chosen, their_chosen, whole, their_whole)):
        return []
    note = f"NaN or Inf after {(~whole).sum()} of {len(whole)} tokens"
    same = np.array_equal(chosen, their_chosen) and np.array_equal(whole, their_whole)
    if same:
        return [Row(LOGITS, "NaN and Inf", None, None, True, f"{note}, the same ones as torch's; the others follow")]
    note += f" in the manifest, after {(~their_whole).sum()} by torch, or in other columns"
    return [_failed(LOGITS, "NaN and Inf", note)]


def _open_reference(folder: Path, manifest: Manifest, base: Source | None) -> Reference:
    """Return torch's model of the folder, or of an adapter's base with the adapter. Raises InputError."""
    if base is None:
        return Reference(folder)
    embedding = manifest.tensors.get(saved_name("model.embed_tokens.weight"))
    return Reference(base.folder, rows=embedding["shape"][0] if embedding else None, adapter=folder)
