"""Answer lm-eval's requests with a model: log-likelihoods in packed rows, and generated texts."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from llama_jax.base.errors import InputError
from llama_jax.data.chat import Chat, chat_template
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.distributed import sharding
from llama_jax.hf.source import Source
from llama_jax.model.definition import define
from llama_jax.model.generate import Decoding, Sampling
from llama_jax.model.llama import RunOptions
from llama_jax.model.roles import Params
from llama_jax.reporting.progress import count_bar, say
from llama_jax.run.scoring import Pair, Scorer, Stopped, prefix_token, rolling_windows

LONGEST_ANSWER = 256  # tokens, where a task names no number: lm-eval's own default
ROWS = 16  # that are generated at once, where no number is given
PIECE = 32  # tokens generated between two looks for a stop string
SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")
_IDLE = {"num_beams": 1, "use_cache": True, "early_stopping": False}  # values of other keys that change nothing
Request = tuple[tuple[str, str], list[int], list[int]]


class Answering(NamedTuple):
    """Describe an answer: how its tokens are chosen, the strings that end it, and the most tokens."""

    sampling: Sampling
    until: tuple[str, ...]
    most: int


class Judge(TemplateLM):
    """Be lm-eval's model. `params` returns the parameters; while it is None, requests are only checked, and answered by
    zeros. `stop` is called before each program; once it returns true, Stopped is raised.

    An answer ends at the end tokens of `source` and of the tokenizer. The temperature is the task's; other values that
    a task leaves out are those of the model's generation_config.json, as in transformers. `rows` answers are generated
    at once.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        source: Source,
        scorer: Scorer,
        run: RunOptions,
        mesh: Mesh,
        *,
        rows: int | None = None,
        disable_bar: bool | None = None,
    ):
        super().__init__()
        self._tokenizer, self._source, self._scorer, self._mesh = tokenizer, source, scorer, mesh
        self._graphdef, self._disable_bar = define(scorer.config, run, mesh).graphdef, disable_bar
        self._ways = sharding.batch_ways(mesh)
        self._rows, self._seed = -(-(rows or ROWS) // self._ways) * self._ways, 0
        self._ids: dict[tuple[str, bool], list[int]] = {}  # of texts, with and without special tokens
        self._said: set[str] = set()
        self.params: Callable[[], Params] | None = None
        self.stop: Callable[[], bool] = lambda: False

    # -- Tokens -------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int | None:
        """Return the id of the end token."""
        return self._tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Return the token before a text without a context. Raises InputError."""
        return prefix_token(self._tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """Return the tokenizer's folder."""
        return str(self._tokenizer.folder).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text, a list that is not changed."""
        return self._encode([string], add_special_tokens)[0]

    def _encode(self, texts: Sequence[str], special: bool | None = None) -> list[list[int]]:
        """Return the ids of each text, new ones computed together.

        `special` is whether the tokenizer adds its tokens; by default, where the text does not begin with bos itself.
        """
        bos = self._tokenizer.special["bos_token"] or self._tokenizer.eos_token
        keys = [(text, not (bos and text.startswith(bos)) if special is None else special) for text in texts]
        new = dict.fromkeys(key for key in keys if key not in self._ids)
        whole, bare = ([text for text, added in new if added is kind] for kind in (True, False))
        self._ids |= zip(((text, True) for text in whole), self._tokenizer.encode_batch(whole), strict=True)
        for text, (ids, _) in zip(bare, self._tokenizer.encode_with_offsets(bare), strict=True):
            self._ids[text, False] = list(ids)
        return [self._ids[key] for key in keys]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the tokenizer's template."""
        return template_of(self._tokenizer)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a chat by the tokenizer's template. Raises InputError."""
        return Chat(self._tokenizer).text(list(chat_history), "--apply_chat_template", add_generation_prompt)

    # -- Log-likelihoods ----------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one."""
        pairs = [request.args for request in requests]
        self._encode([text for context, rest in pairs if context for text in (context + rest, context.rstrip())])
        self._encode([rest for context, rest in pairs if not context], False)
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text."""
        length, texts = self._scorer.max_length, self._encode([request.args[0] for request in requests])
        windows = [[*rolling_windows(ids, self.prefix_token_id, length)] for ids in texts]
        scores = iter(self._score([pair for of_text in windows for pair in of_text]))
        return [sum(next(scores)[0] for _ in of_text) for of_text in windows]

    def _score(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        self._scorer.check(pairs)
        if self.params is None:
            return [(0.0, False)] * len(pairs)
        return [(score.loglikelihood, score.is_greedy) for score in self._scorer(self.params(), pairs, self.stop)]

    # -- Generated texts ----------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to a stop string, an end token or the task's number of tokens.

        Raises InputError for keys of `generation_kwargs` that are not there.
        """
        asked = [self._answering(request) for request in requests]
        prompts = [
            ids[-(self._scorer.max_length - answering.most) :] or [self.prefix_token_id]
            for ids, answering in zip(self._encode([r.args[0] for r in requests]), asked, strict=True)
        ]
        self._scorer.check([(ids, ()) for ids in prompts])
        texts = [""] * len(requests)
        if self.params is None:
            return texts
        order = sorted(range(len(requests)), key=lambda n: (repr(asked[n]), -len(prompts[n])))
        with count_bar("generating", len(requests), "answer", self._disable_bar) as bar:
            for answering, group in itertools.groupby(order, key=lambda n: asked[n]):
                numbers = list(group)
                for first in range(0, len(numbers), self._rows):
                    here = numbers[first : first + self._rows]
                    answers = self._generate([prompts[n] for n in here], answering, min(self._rows, len(numbers)))
                    for n, text in zip(here, answers, strict=True):
                        texts[n] = text
                    bar.update(len(here))
        return texts

    def check_tasks(self, tasks: Iterable[Any]) -> None:
        """Raise InputError for a task whose texts cannot be generated here."""
        for task in tasks:
            if task.OUTPUT_TYPE == "generate_until":
                options = task.config.generation_kwargs
                self._answering(Instance("generate_until", {}, ("", options), 0, (task.config.task, 0, 1)))

    def _answering(self, request: Instance) -> Answering:
        """Return how a request is to be answered. Raises InputError."""
        task, options = f"task {request.task_name}", dict(normalize_gen_kwargs(request.args[1], LONGEST_ANSWER))
        until, most = options.pop("until", None) or [], options.pop("max_gen_toks")
        draws, temperature = options.pop("do_sample"), options.pop("temperature", 0.0)
        given = {key: options.pop(key) for key in SAMPLING if key in options}
        if unknown := [key for key, value in options.items() if value != _IDLE.get(key)]:
            raise InputError(f"{task}: its generation_kwargs have {', '.join(unknown)}, which is not there")
        if sharding.row_ways(self._mesh) > 1:
            raise InputError(f"{task}: generates text, which --mesh context={sharding.row_ways(self._mesh)} cannot do")
        if not 0 < most < self._scorer.max_length:
            fault = f"answers of {most:,} tokens leave no room for questions in {self._scorer.max_length:,} tokens"
            raise InputError(f"{task}: {fault}; set max_gen_toks in its generation_kwargs")
        sampling, lines = self._source.sampling(float(temperature) if draws else 0.0, **given)
        for line in lines:
            if line not in self._said:
                say(line)
        self._said.update(lines)
        ends = [self._tokenizer.eos_token] if self._tokenizer.eos_token else []
        return Answering(sampling, (*([until] if isinstance(until, str) else until), *ends), most)

    def _generate(self, prompts: list[list[int]], answering: Answering, least: int) -> list[str]:
        """Return the text that follows each prompt. Raises Stopped.

        A stop string is looked for after each piece. There are at least `least` rows, so that one shape compiles.
        """
        assert self.params is not None
        model, tokenizer = nnx.merge(self._graphdef, self.params()), self._tokenizer
        ends = self._source.end_ids(tokenizer.eos_token_id)
        rows = prompts + prompts[:1] * (-(-least // self._ways) * self._ways - len(prompts))
        self._seed += 1
        with jax.set_mesh(self._mesh):
            decoding = Decoding(model, rows, answering.most, ends, answering.sampling, self._seed)
            for other in range(len(prompts), len(rows)):
                decoding.end(other)
            while True:
                texts = [tokenizer.decode(ids) for ids in decoding.rows[: len(prompts)]]
                answers = [cut(text, answering.until) for text in texts]
                for i, (answer, text) in enumerate(zip(answers, texts, strict=True)):
                    if answer != text:
                        decoding.end(i)
                if decoding.finished:
                    return answers
                if self.stop():
                    raise Stopped
                decoding.step(PIECE)


def template_of(tokenizer: Tokenizer) -> str | None:
    """Return a tokenizer's chat template, None for none."""
    return chat_template(tokenizer.folder, tokenizer.config)


def cut(text: str, until: Sequence[str]) -> str:
    """Return the text before the first of the stop strings."""
    for stop in filter(None, until):
        text = text.partition(stop)[0]
    return text
