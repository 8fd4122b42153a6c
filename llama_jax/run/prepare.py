"""Settle a run before its weights are read: devices, model, data, checkpoint to resume, planner."""

import dataclasses
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from llama_jax.base.bucket import as_path
from llama_jax.base.errors import InputError
from llama_jax.distributed import processes, sharding
from llama_jax.distributed.platform import set_up_jax
from llama_jax.hf.source import Source, training_dtype
from llama_jax.hf.trainer_checkpoint import is_trainers, read_trainer_checkpoint, understanding
from llama_jax.plan import explain
from llama_jax.plan.planner import Planner, choose_scan
from llama_jax.reporting.progress import say, set_level, silence
from llama_jax.reporting.stopwatch import Stopwatch
from llama_jax.run.handover import Handover, saved_run
from llama_jax.run.resume import Facts, SavedRun, choose_checkpoint, compare_with_saved
from llama_jax.run.samples import Samples
from llama_jax.run.tasks import TrainingTasks, open_tasks
from llama_jax.run.trainers_state import TrainersState
from llama_jax.setup.arguments import Arguments
from llama_jax.setup.job import Job, make_job

LEVELS = {"warning": logging.WARNING, "error": logging.ERROR, "critical": logging.CRITICAL}  # of `--log_level`


@dataclass(frozen=True)
class Prepared:
    """Hold the parts of a run that are settled before weights are read.

    `watch` counts the time since the command's start. `resume_from` is the checkpoint to resume and `saved` its JSON,
    None in a new run; `trainers` has the arrays of a checkpoint of the HF Trainer. `tokenizer_folder` holds files to
    export in the place of the job's tokenizer, None where there is one. `samples` answers the questions of
    `--sample_prompts`, None for none. `tasks` are those of `--eval_tasks`.
    """

    args: Arguments
    platform: str
    output_dir: Path
    mesh: Mesh
    watch: Stopwatch
    source: Source
    job: Job
    facts: Facts
    planner: Planner
    resume_from: Path | None
    saved: SavedRun | None
    trainers: TrainersState | None
    tokenizer_folder: Path | None
    samples: Samples | None
    tasks: TrainingTasks | None

    @property
    def resume_step(self) -> int:
        """Return the number of updates before this start, 0 in a new run."""
        return self.saved.trainer_state["global_step"] if self.saved else 0

    @property
    def goes_on(self) -> bool:
        """Return whether the run goes on in its own folder."""
        ours = self.resume_from if self.trainers is None else None
        return ours is not None and ours.parent == self.output_dir

    @property
    def quiet(self) -> bool | None:
        """Return True where bars are switched off; None leaves the choice to tqdm."""
        return self.args.disable_tqdm or None


def join(args: Arguments) -> tuple[str, Mesh]:
    """Join the other processes and return the platform and the mesh of the devices. Raises InputError."""
    set_level(LEVELS.get(args.log_level, logging.INFO))
    if args.log_level in ("debug", "detail"):
        jax.config.update("jax_log_compiles", True)
    processes.join(args.coordinator_address, args.num_processes, args.process_id, args.use_cpu, args.watchdog_seconds)
    platform = set_up_jax(args.use_cpu, args.tf32, args.full_determinism)
    if not processes.is_first():
        silence()
    for note in args.notes(platform):
        say(note)
    with processes.agreed():
        return platform, sharding.make_mesh(spec=args.mesh)


def prepare(args: Arguments, platform: str, mesh: Mesh, started: float | None = None) -> Prepared:
    """Settle the run; all processes raise the same InputError. `started` is `time.monotonic()` at the command's start,
    by default now."""
    watch = Stopwatch("start", time.monotonic() if started is None else started)
    with processes.agreed():
        prepared = _prepared_alone(args, platform, mesh, watch)
    facts = dataclasses.asdict(prepared.facts)
    facts["--sample_prompts"] = prepared.samples and prepared.samples.digest
    processes.same({"--output_dir's last checkpoint": prepared.resume_step, **args.decisive, **facts})
    if not args.explain:
        processes.check_shared(prepared.output_dir)
    if args.show_examples and processes.is_first():
        out = sys.stderr if args.explain == "json" else sys.stdout
        print(explain.show_examples(prepared.job, args.show_examples, explain.wants_colour(out)), file=out)
    return prepared


def _prepared_alone(args: Arguments, platform: str, mesh: Mesh, watch: Stopwatch) -> Prepared:
    """Settle the run as this process sees it: model, data, checkpoint to resume, planner. Raises InputError."""
    output_dir, saved, theirs, handover = as_path(args.output_dir), None, None, None
    resume_from = None if args.explain else choose_checkpoint(args, output_dir)
    source = Source(
        args.model_name_or_path,
        args.allow_pickle,
        tokenizer=args.tokenizer_name,
        allow_nonfinite=args.allow_nonfinite,
    )
    if source.folder.resolve() == output_dir.resolve():
        raise InputError(f"output_dir {output_dir} is the folder of the model that is trained; choose another")
    for note in source.notes:
        say(note)
    if resume_from and is_trainers(resume_from):
        if args.export_only:
            raise InputError(f"--export_only True: {resume_from} is the HF Trainer's, and holds an HF model already")
        theirs = read_trainer_checkpoint(resume_from)
        handover = Handover.of(theirs, args)
    elif resume_from:
        saved = SavedRun.read(resume_from)
        handover = Handover(**saved.handover) if saved.handover else None
    if handover:
        args = handover.apply(args, str(resume_from))
    ranks = args.world_size or (saved and saved.ranks) or (theirs and theirs.ranks) or sharding.batch_ways(mesh)
    quiet = args.disable_tqdm or None
    with watch.phase("data"):
        job = make_job(
            args,
            source.config,
            lambda: source.tokenizer_folder,
            ranks,
            disable_bars=quiet,
            resumed=handover.resumed if handover else None,
        )
    if handover:
        job.schedule.give(handover.updates, handover.rate)
    if args.profiled and args.profiled[-1] >= job.order.updates:
        raise InputError(f"--profile_updates {args.profile_updates}: the run has {job.order.updates:,} updates")
    for warning in end_warnings(source, job):
        say(f"warning: {warning}")
    dtype = args.dtype or training_dtype(source, args.hf_compat)
    facts = Facts.of(job, dtype=dtype, scan_layers=choose_scan(job, platform))
    if theirs and handover:
        with understanding(theirs.folder):
            saved = saved_run(theirs, handover, facts, job)
    if saved:
        compare_with_saved(facts, saved, str(resume_from))
        facts = dataclasses.replace(facts, scan_layers=saved.facts.scan_layers)
        if facts.scan_layers and args.offload_optimizer:
            raise InputError(
                f"{resume_from}: its layers are stacked, and --offload_optimizer needs each by itself; leave it out"
            )
    planner = Planner(job, mesh, platform, dtype=dtype, scan_layers=facts.scan_layers)
    trainers = None
    if theirs:
        with understanding(theirs.folder):
            trainers = TrainersState(theirs, job, planner, mesh)
    # Read now: a problem with the tokenizer is reported before the run, not after it.
    tokenizer_folder = None if job.tokenizer or args.explain else source.tokenizer_to_copy()
    say(planner.attention_line)
    return Prepared(
        args=args,
        platform=platform,
        output_dir=output_dir,
        mesh=mesh,
        watch=watch,
        source=source,
        job=job,
        facts=facts,
        planner=planner,
        resume_from=resume_from,
        saved=saved,
        trainers=trainers,
        tokenizer_folder=tokenizer_folder,
        samples=Samples(args.sample_prompts, source, planner) if args.sample_prompts and not args.explain else None,
        tasks=open_tasks(args, source, planner) if args.eval_tasks and job.order.evaluated else None,
    )


def end_warnings(source: Source, job: Job) -> list[str]:
    """Return a line where the exported model will not stop at its trained end token. Raises InputError."""
    ends, eos = source.eos_token_ids(), job.tokenizer.eos_token_id if job.tokenizer else None
    if eos is None or eos in ends or job.args.hf_compat == "5":
        return []
    assert job.tokenizer
    return [
        f"{source.folder}: generation ends at the tokens {ends} by generation_config.json or config.json, not at the "
        f"tokenizer's {job.tokenizer.eos_token!r} ({eos}), so that programs that read these files will not stop; add "
        f"{eos} to eos_token_id there, or give --hf_compat 5, which does"
    ]
