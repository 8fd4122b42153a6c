"""Answer the records of a file into a JSONL file. An interrupted run goes on where it was."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from llama_jax.base.bucket import local_path
from llama_jax.base.errors import InputError
from llama_jax.base.files import check_regular, lock
from llama_jax.data.questions import ANSWER, Prompt
from llama_jax.data.readers import Reader
from llama_jax.reporting.progress import count_bar, say
from llama_jax.run.answering import Answerer, Rules

PARTIAL = ".partial"  # suffix of the answers until all are there


class AnswerFile:
    """Collect answers in `PATH.partial` in any order, and write `PATH` in the order of the records when all are there.

    The first line of the partial file holds the settings that decide the answers; each further line is a record's
    place and its answer.
    """

    def __init__(self, name: str):
        if "://" in name:
            raise InputError(f"--output_file {name}: should be a file on this machine; copy it from there afterwards")
        self.path, self._partial = local_path(name), local_path(name + PARTIAL)
        self.answers: dict[int, str] = {}
        if os.path.lexists(self.path):
            kind = "is a folder" if os.path.isdir(self.path) else "is there already"
            raise InputError(f"--output_file {name}: {kind}; remove it, or give another name")
        if not os.path.isdir(self.path.parent):
            raise InputError(f"--output_file {name}: its folder is not there; make the folder {self.path.parent}")

    def begin(self, settings: dict[str, Any], count: int) -> None:
        """Read the answers of an interrupted run of the same settings, or begin the file. Raises InputError."""
        first = json.dumps(settings, sort_keys=True)
        try:
            self._partial.touch()
            check_regular(self._partial)
            self._file = self._partial.open("r+b")
            self._lock()
            lines = self._file.read().split(b"\n")[:-1]  # without a torn line
        except OSError as e:
            raise InputError(f"--output_file {self.path}: cannot be written: {e.strerror}; give another name") from None
        if lines:
            try:
                held = json.loads(lines[0])
                self.answers = {int(place): str(text) for place, text in map(json.loads, lines[1:])}
            except (ValueError, TypeError):
                raise InputError(f"{self._partial}: is no file of answers that this command began; remove it") from None
            if held != json.loads(first):
                other = [key for key in settings if not isinstance(held, dict) or held.get(key) != settings[key]]
                raise InputError(
                    f"{self._partial}: was begun with another {', '.join(other)}; give the same again to go on, or "
                    "remove the file to start anew"
                )
            say(f"{self._partial} holds {len(self.answers):,} of {count:,} answers; the others follow")
        self._file.seek(sum(len(line) + 1 for line in lines))
        self._file.truncate()
        try:
            self._write([] if lines else [first])
        except OSError as e:
            raise InputError(f"--output_file {self.path}: cannot be written: {e.strerror}; make room") from None

    def add(self, places: Sequence[int], texts: Sequence[str]) -> None:
        """Add the answers to the records at some places."""
        self.answers.update(zip(places, texts, strict=True))
        self._write([json.dumps(pair) for pair in zip(places, texts, strict=True)])

    def finish(self, records: Reader) -> None:
        """Write each record with its answer, in order, and remove the partial file."""
        temporary = self.path.with_name(self.path.name + ".tmp")
        try:
            with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:  # JSON's way for half a pair
                for place, record in enumerate(records):
                    answered = record | {ANSWER: self.answers[place]}
                    file.write(json.dumps(answered, ensure_ascii=False, default=str) + "\n")
            os.replace(temporary, self.path)
        except OSError:  # a full disk
            temporary.unlink(missing_ok=True)
            raise
        self._partial.unlink()
        self._file.close()  # the lock's end

    def _lock(self) -> None:
        """Hold the partial file for this process alone. Raises InputError."""
        try:
            warning = lock(self._file, self._partial)
        except BlockingIOError:
            raise InputError(
                f"--output_file {self.path}: another command writes its answers; wait for its end, or give another name"
            ) from None
        if warning:
            say(warning)
        if os.path.lexists(self.path):  # another command has finished since `__init__`
            self._partial.unlink(missing_ok=True)
            raise InputError(f"--output_file {self.path}: is there already; remove it, or give another name")

    def _write(self, lines: Sequence[str]) -> None:
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()


def settings_of(model: dict[str, Any], prompts: Sequence[Prompt], rules: Rules) -> dict[str, Any]:
    """Return what decides the answers: the model's names, the prompts' tokens, and the rules."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.continues} {list(prompt.ids)} ".encode())
    decided = asdict(rules) | rules.sampling._asdict() | {"sampling": None}
    return json.loads(json.dumps(model | {"input_file": digest.hexdigest()} | decided))


def answer_records(
    answerer: Answerer, records: Reader, prompts: Sequence[Prompt], output: AnswerFile, batch_size: int
) -> None:
    """Answer the prompts of all records into the file, which has begun; blocks hold prompts of like length."""
    left = [place for place in range(len(prompts)) if place not in output.answers]
    left.sort(
        key=lambda place: -len(prompts[place].ids)
    )  # the longest first: what does not fit in memory fails at once
    rows, cut = min(batch_size, len(prompts)), 0
    with count_bar("answering", len(prompts), "answer") as bar:
        bar.update(len(prompts) - len(left))
        try:
            for start in range(0, len(left), rows):
                places = left[start : start + rows]
                texts, of_block = answerer.block([prompts[place] for place in places], places, rows)
                output.add(places, texts)
                cut += of_block
                bar.update(len(places))
        except KeyboardInterrupt:
            done, same = f"{len(output.answers):,} of {len(prompts):,}", "the same command goes on from there"
            say(f"{done} answers are in {output.path}{PARTIAL}; {same}")
            raise
    output.finish(records)
    limited = f"; {cut:,} of them cut at --max_new_tokens" if cut else ""
    say(f"{len(prompts):,} answers: {output.path}{limited}")
