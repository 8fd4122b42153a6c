"""Small tokenizers made from a few texts: sentencepiece, and `tokenizer.json` in the manners of LLaMA 2 and 3."""

import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\nName three colours of the rainbow, and say why each of them is where it is.\n\n### Response:",
    "def f(x):\n    return x + 1\n\nThe quick brown fox jumps over the lazy dog; 12,345 times!",
    "Übergrößenträger déjà vu, naïve café. 你好世界. Привет, мир. \u0928\u092e\u0938\u094d\u0924\u0947",
]


BOS, EOS, END = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def for_tokenizers_0_15(folder: Path) -> None:
    """Write `tokenizer.json` as tokenizers 0.15 reads it."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    write(folder, "tokenizer.json", tokenizer)


def train_sentencepiece(
    folder: Path, symbols: dict[str, list[str]] | None = None, spaces: bool = True, **config: Any
) -> Path:
    """A model of LLaMA's kind: BPE, bytes for what it lacks, spaces kept, or (`spaces`) runs of them made one."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=file,
            model_type="bpe",
            vocab_size=400,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=not spaces,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            minloglevel=2,
            **(symbols or {}),
        )
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    } | config
    write(folder, "tokenizer_config.json", config)
    return folder


def processor(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def copy(folder: Path, to: Path, **config: Any) -> Path:
    """The tokenizer's files in another folder, with changes to `tokenizer_config.json`."""
    to.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("tokenizer*"):
        shutil.copyfile(path, to / path.name)
    old = json.loads((to / "tokenizer_config.json").read_text())
    write(to, "tokenizer_config.json", old | config)
    return to


def train_byte_level(folder: Path, specials: list[Any] | None = None, **config: Any) -> Path:
    """As LLaMA 3 ships it: byte-level BPE, split by a pattern, bos put by the post-processor."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(specials or [BOS, EOS, END])
    bos = tokenizer.token_to_id(BOS)
    template = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, **config}
    write(folder, "tokenizer_config.json", config)
    return folder


def convert_sentencepiece(folder: Path, model: Path, template: bool = True, **config: Any) -> Path:
    """As LLaMA 2 ships it beside `tokenizer.model`: the same pieces as BPE with bytes, spaces made by a normalizer."""
    folder.mkdir(parents=True, exist_ok=True)
    sp = processor(model)
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i, piece in enumerate(pieces[3:], start=3):
        if not sp.is_byte(i):
            halves = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
            merges += [(i, a, b) for a, b in halves if a in vocab and b in vocab]
    merges = [(a, b) for _, a, b in sorted(merges, key=lambda m: (m[0], vocab[m[1]], vocab[m[2]]))]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    } | config
    write(folder, "tokenizer_config.json", config)
    return folder
