"""Answer the questions of `--sample_prompts` with the weights of a run, at its start and at each save."""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.errors import JaxRuntimeError

from llama_jax.base.errors import InputError
from llama_jax.data.questions import Prompt, Prompts, read_questions
from llama_jax.data.records import ALPACA, COMPLETION, messages
from llama_jax.data.tokenizer import open_tokenizer
from llama_jax.distributed import sharding
from llama_jax.hf.source import Source
from llama_jax.model.definition import define
from llama_jax.model.generate import Sampling
from llama_jax.model.roles import Params
from llama_jax.plan.planner import Planner
from llama_jax.reporting.progress import say
from llama_jax.run.answering import Answerer, Rules

NEW_TOKENS = 128
MOST = 64  # questions: all are answered in one block


class Samples:
    """Answer questions greedily. `shown` are their texts. Raises InputError for a file without usable questions.

    A plain prompt, and a line of a .txt file, is asked in the form of the training data.
    """

    def __init__(self, name: str, source: Source, planner: Planner):
        job, self._mesh = planner.job, planner.mesh
        if sharding.row_ways(self._mesh) > 1:
            raise InputError("--sample_prompts: no answer is made while --mesh divides rows; leave context out of it")
        tokenizer = job.tokenizer or open_tokenizer(source.tokenizer_folder, job.args.hf_compat)
        records = [*read_questions(name, say)]
        if len(records) > MOST:
            raise InputError(f"--sample_prompts {name}: has {len(records):,} questions; give at most {MOST}")
        if name.endswith(".txt"):
            records = [{"prompt": record["text"]} for record in records]
        self.shown = [_text(record) for record in records]
        if key := {ALPACA: "instruction", COMPLETION: "text"}.get(job.form):
            records = [{key: r["prompt"]} if isinstance(r.get("prompt"), str) else r for r in records]

        def check(ids: Sequence[int]) -> None:
            if max(ids) >= job.config.vocab_size:
                raise InputError(f"--sample_prompts {name}: a token is past the model's {job.config.vocab_size} rows")

        prompts = Prompts(tokenizer, check)
        self._prompts: list[Prompt] = [
            prompts.of_record(record, f"--sample_prompts {name}: record {i}") for i, record in enumerate(records, 1)
        ]
        digest = hashlib.sha256(repr([[*prompt.ids] for prompt in self._prompts]).encode())
        self.digest = digest.hexdigest()  # to compare among processes
        self._rules = Rules(NEW_TOKENS, source.end_ids(tokenizer.eos_token_id), (), Sampling(), seed=0)
        self._tokenizer, self._graphdef = tokenizer, define(job.config, planner.answering, self._mesh).graphdef
        ways = sharding.batch_ways(self._mesh)
        self._rows = -(-len(records) // ways) * ways
        self._fits = True

    def __call__(self, params: Params) -> list[str] | None:
        """Return the answers, None where a device's memory does not suffice: after one warning, none are made."""
        if not self._fits:
            return None
        answerer = Answerer(nnx.merge(self._graphdef, params), self._tokenizer, self._rules)
        try:
            with jax.set_mesh(self._mesh):
                return answerer.block(self._prompts, range(len(self._prompts)), self._rows)[0]
        except JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e) or jax.process_count() > 1:  # the other processes wait for this one
                raise
            self._fits = False
            say("warning: --sample_prompts: the devices' memory does not suffice beside the training; no answers")
            return None


def _text(record: dict[str, Any]) -> str:
    """Return the text that stands for a question on the page."""
    for key in ("instruction", "prompt", "text"):
        if isinstance(record.get(key), str):
            return "\n".join(part for part in (record[key], record.get("input")) if part)
    turns = messages({"messages": record["prompt"]} if isinstance(record.get("prompt"), list) else record)
    asked = [turn["content"] for turn in turns if turn["role"] == "user"]
    return str(asked[-1] if asked else turns[-1]["content"])
