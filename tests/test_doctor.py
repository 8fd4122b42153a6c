"""The data doctor and the printed examples, against a plain reading of the records.

The tokenizer here has one token a byte and one for ":)", which is a prompt's last character and an output's first one:
its reference is a replacement in the text.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import CONFIG, make_records, run, write_json, write_model, write_tokenizer

import train_jax
from llama_jax.base.errors import InputError
from llama_jax.data.doctor import as_lines
from llama_jax.model.config import LlamaConfig
from llama_jax.plan.explain import examine, show_examples, wants_colour
from llama_jax.setup.arguments import parse_arguments
from llama_jax.setup.job import Job, make_job

BOS, EOS, SMILE = 256, 257, 259
Record = dict[str, str]


def prompt_of(record: Record) -> str:
    more = ", paired with an input that provides further context" if record.get("input") else ""
    parts = [
        f"Below is an instruction that describes a task{more}. Write a response that appropriately completes the "
        "request.",
        "### Instruction:\n" + record["instruction"],
    ]
    parts += ["### Input:\n" + record["input"]] if record.get("input") else []
    return "\n\n".join([*parts, "### Response:"])


def tokens(text: str) -> list[str]:
    """The text cut as the tokenizer does; the bytes' own ids do not matter here."""
    cut = re.split(r"(:\))", text)
    return ["<s>"] + [x for part in cut for x in ([part] if part == ":)" else map(str, part.encode()))]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("model"), {**CONFIG, "vocab_size": 260})
    write_tokenizer(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"][":)"] = SMILE
    tokenizer["model"]["merges"] = [[":", ")"]]
    write_json(folder / "tokenizer.json", tokenizer)
    return folder


def job_of(model: Path, folder: Path, records: list[Any], *flags: Any) -> Job:
    """The job on these records; the cache lies in the folder."""
    argv = ["--model_name_or_path", model, "--data_path", write_json(folder / "data.json", records), *flags]
    config = LlamaConfig.from_hf(json.loads((model / "config.json").read_text()), "config.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return make_job(parse_arguments([str(x) for x in argv]), config, lambda: model, 1, True)


def told(numbers: list[int]) -> dict[str, Any]:
    return {"count": len(numbers), "records": numbers[:8]}


texts = st.sampled_from(["", " ", ":)", ") so", "a", "naïve ☃", "x" * 30, "Say :) twice :)"])
records_strategy = st.lists(
    st.fixed_dictionaries({"instruction": texts, "output": texts}, optional={"input": texts}), min_size=2, max_size=20
)


@settings(max_examples=25)
@given(records=records_strategy, limit=st.integers(150, 330), split=st.sampled_from([0, 30]))
def test_what_is_found_is_there(model, records, limit, split, tmp_path_factory, monkeypatch):
    """Of the examples that are trained on, by the records' numbers in the file; the same from the cache."""
    for module in ("doctor", "examples"):
        monkeypatch.setattr(f"llama_jax.data.{module}.CHUNK", 3)
    first = round(len(records) * split / 100)
    whole = {i: [*tokens(prompt_of(r) + r["output"]), "</s>"] for i, r in enumerate(records, start=1) if i > first}
    prompts = {i: tokens(prompt_of(records[i - 1])) for i in whole}
    cut = {i: x[:limit] for i, x in whole.items()}
    expected = {
        "truncated": [i for i in whole if cut[i] != whole[i]],
        "eos_lost": [i for i in whole if cut[i][-1] != "</s>"],
        "masked": [i for i in whole if len(prompts[i]) >= len(cut[i])],
        "boundary_merges": [i for i in whole if whole[i][: len(prompts[i])] != prompts[i]],
        "doubled_eos": [],
        "duplicates": [i for i in whole if any(cut[i] == cut[j] for j in whole if j < i)],
        "empty_outputs": [i for i in whole if not records[i - 1]["output"].strip()],
        "past_positions": [],
    }
    assume(len(expected["masked"]) < len(whole) and (not split or first > 0))
    folder = tmp_path_factory.mktemp("run")
    flags = ["--model_max_length", limit, "--validation_split_percentage", split]
    try:
        job = job_of(model, folder, records, *flags)
    except InputError as e:
        assert "every label is masked" in str(e)
        return
    facts = examine(job)
    absent = dict.fromkeys(["doubled_bos", "dropped"])
    assert facts["findings"] == absent | {name: told(numbers) for name, numbers in expected.items()}
    assert facts["examples"] == len(whole) and facts["form"] == "alpaca" and facts["tokenizer"] == []
    assert examine(job_of(model, folder, records, *flags)) == facts

    lengths = sorted(map(len, cut.values()))
    edges, counts = facts["lengths"]["edges"], facts["lengths"]["counts"]
    bins = Counter(1 << (n.bit_length() - 1) for n in lengths)
    assert {low: count for low, count in zip(edges, counts, strict=False) if count} == bins
    assert edges == [edges[0] << i for i in range(len(counts) + 1)]
    percentiles = facts["lengths"]["percentiles"]
    assert (percentiles["0"], percentiles["100"]) == (lengths[0], lengths[-1])
    assert percentiles["50"] == int(np.median(lengths))

    said = as_lines(json.loads(json.dumps(facts)))
    named = [subject for subject, _ in said if subject]
    assert named == ["data", *(name.replace("_", " ") for name, numbers in expected.items() if numbers)]
    for subject, text in said:
        if numbers := expected.get(subject.replace(" ", "_")):
            more = ", ..." if len(numbers) > 8 else ""
            assert text.startswith(f"{len(numbers)} (record {', '.join(map(str, numbers[:8]))}{more}) - ")


def test_what_tokens_do_not_tell(model, tmp_path):
    """Records of tokens: which are all masked, and which repeat another's ids under whatever labels."""
    records: list[dict[str, list[int]]] = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [5, 6, 7, 8], "labels": [-100] * 4},
        {"input_ids": [5, 6, 7], "labels": [5, -100, -100]},
        {"input_ids": [5, 6], "labels": [5, 6]},
    ]
    found = examine(job_of(model, tmp_path, records))["findings"]
    assert found["masked"] == told([2, 3]) and found["duplicates"] == told([3])
    assert {name for name, where in found.items() if where is None} == {
        *("truncated", "eos_lost", "boundary_merges", "dropped", "empty_outputs", "doubled_bos", "doubled_eos")
    }


def copied(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


TEMPLATE = (
    "{% for turn in messages %}<s>{{ turn.role }}: {{ turn.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def test_chats(model, tmp_path):
    """By bytes: 10 tokens of a user who says "a", and 14 around what the assistant says, its last one a new line."""
    folder = copied(model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    said = [
        ("a", "b"),
        ("a", ""),
        ("a", "c" * 100),
        ("a", "b"),
        ("a" * 100, "b"),
        ("a", "d" * 36),
        ("a", "d" * 37),
        ("", "b"),
    ]
    records = [
        {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}
        for user, assistant in said
    ]
    records[0] = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    facts = examine(job_of(folder, tmp_path, records, "--model_max_length", 60))
    assert facts["form"] == "chat"
    assert facts["findings"] == {
        "truncated": told([3, 5, 7]),
        "eos_lost": told([3, 5]),  # of the 7th only the new line is
        "masked": told([5]),
        **dict.fromkeys(["boundary_merges", "doubled_bos", "doubled_eos"]),
        "duplicates": told([4]),
        "dropped": told([]),
        "empty_outputs": told([2]),
        "past_positions": told([]),
    }


@pytest.mark.parametrize("tagged", [False, True])
def test_words_that_the_template_drops(model, tagged, tmp_path):
    """Thoughts that are cut, of all turns but the last; not white space, nor a thought's marks that it writes anew."""
    folder = copied(model, tmp_path / "model")
    said = (
        "{% if '</think>' in turn.content %}{{ '<think>' if loop.last }}"
        "{{ turn.content.split('</think>')[0].split('<think>')[-1] + '</think>' if loop.last }}"
        "{{ turn.content.split('</think>')[-1].strip() }}{% else %}{{ turn.content.strip() }}{% endif %}</s>"
    )
    template = TEMPLATE.replace(
        "{{ turn.content }}</s>", f"{{% generation %}}{said}{{% endgeneration %}}" if tagged else said
    )
    (folder / "chat_template.jinja").write_text(template)
    thought, plain = "<think>\nwhy\n</think>\n\n4", " a \n"
    chats = [[plain], [thought], [plain, thought], [thought, plain], [plain, plain], [plain, "why</think>"]]
    records = [
        {
            "messages": [
                turn
                for text in chat
                for turn in ({"role": "user", "content": " a"}, {"role": "assistant", "content": text})
            ]
        }
        for chat in chats
    ]
    records[4]["messages"][3]["reasoning_content"] = "because"
    job = job_of(folder, tmp_path, records, "--model_max_length", 600)
    facts = examine(job)
    assert facts["findings"]["dropped"] == told([4, 5])
    said = dict(as_lines(facts))["dropped"]
    assert said.startswith("2 (record 4, 5) - the chat template leaves out words")
    assert "⟦<think>" in show_examples(job, 6, False)


def test_a_call_of_a_tool_is_no_empty_output(model, tmp_path):
    folder = copied(model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        TEMPLATE.replace(
            "{{ turn.content", "{% for c in turn.tool_calls or [] %}{{ c.function.name }}{% endfor %}{{ turn.content"
        )
    )
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    found = examine(job_of(folder, tmp_path, [{"messages": [{"role": "user", "content": "a"}, call]}]))["findings"]
    assert found["empty_outputs"] == told([]) and found["dropped"] == told([])


def test_a_chat_without_ends_has_none_to_lose(model, tmp_path):
    folder = copied(model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("</s>", ""))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 99}]
    found = examine(job_of(folder, tmp_path, [{"messages": turns}], "--model_max_length", 60))["findings"]
    assert found["truncated"] == told([1]) and found["eos_lost"] == told([])


def test_plain_text(model, tmp_path):
    """With the beginning and the end 2 tokens more than bytes; a text that has them gets none."""
    records = [{"text": text} for text in ("a" * 8, "b" * 9, "b" * 10, " ", "<s>cccccccc</s>")]
    facts = examine(job_of(model, tmp_path, records, "--model_max_length", 10))
    assert facts["form"] == "text"
    assert facts["findings"] == {
        **{"truncated": told([2, 3]), "eos_lost": told([2, 3]), "masked": told([]), "boundary_merges": None},
        **{"duplicates": told([3]), "empty_outputs": told([4]), "doubled_bos": told([5]), "doubled_eos": None},
        "past_positions": told([]),
        "dropped": None,
    }


def test_an_eos_that_is_unk(model, tmp_path):
    folder = copied(model, tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {**config, "unk_token": "</s>"})
    facts = examine(job_of(folder, tmp_path, [{"instruction": "a", "output": "b"}]))
    assert len(facts["tokenizer"]) == 1 and "unk_token" in facts["tokenizer"][0]
    assert [text for subject, text in as_lines(facts) if subject == "tokenizer"] == facts["tokenizer"]


def test_add_eos_token_is_named(model, tmp_path):
    """Each prompt ends with an eos of the tokenizer, which is not a token shared by prompt and output."""
    folder = copied(model, tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {**config, "tokenizer_class": "LlamaTokenizer", "add_eos_token": True})
    job = job_of(folder, tmp_path, [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": ") b"}])
    assert job.tokenizer
    assert job.examples[0][1].tolist()[-2:] == [job.tokenizer.eos_token_id] * 2
    found = examine(job)["findings"]
    assert found["doubled_eos"] == told([1, 2]) and found["boundary_merges"] == told([2])


@pytest.mark.parametrize("spoken", ["text", "json"])
def test_the_command_tells_it(model, spoken, tmp_path):
    records = [{"instruction": "a", "output": x} for x in ("b", "", ") c", "b", "d" * 600)]
    data = write_json(tmp_path / "data.json", records)
    argv = ["--model_name_or_path", model, "--data_path", data, "--output_dir", tmp_path / "out", "--explain", spoken]
    outcome = run(train_jax.main, *argv)
    assert outcome.code == 0, outcome.err
    found = {"duplicates": 4, "empty_outputs": 2, "boundary_merges": 3, "truncated": 5, "eos_lost": 5}
    if spoken == "json":
        told_of = json.loads(outcome.out)["data"]["findings"]
        none = {name: told([]) for name in ("masked", "past_positions", "doubled_eos")}
        none |= {"doubled_bos": None, "dropped": None}
        assert told_of == {name: told([record]) for name, record in found.items()} | none
    else:
        for name, record in found.items():
            assert re.search(rf"^{name.replace('_', ' ')}: +1 \(record {record}\) - ", outcome.out, re.MULTILINE)
        assert re.search(r"^data: +5 alpaca examples of ", outcome.out, re.MULTILINE)
        assert "--model_max_length 512" in outcome.out


def test_alpaca_itself(shared, tmp_path):
    """Its first 999 records, with LLaMA's tokenizer: 32 prompts merge, as test_examples counts them."""
    records = json.loads((shared / "data" / "alpaca" / "alpaca_data.json").read_text(encoding="utf-8"))[:999]
    folder = copied(shared / "data" / "llama-tokenizer", tmp_path / "model")
    write_json(folder / "config.json", {**CONFIG, "vocab_size": 32000})
    job = job_of(folder, tmp_path, records, "--num_train_epochs", 1)
    found = examine(job)["findings"]
    assert found["boundary_merges"]["count"] == 32
    assert found["empty_outputs"] == told([i for i, r in enumerate(records, start=1) if not r["output"]])
    assert found["truncated"] == found["eos_lost"] == told([265])

    shown = show_examples(job, 50, False).split("--- example ")[1:]
    assert len(shown) == 50
    for part in shown:
        i, text = int(part.split()[0]), part.split(" ---\n", 1)[1].rstrip("\n").replace("⟦", "").replace("⟧", "")
        whole = f"<s>{prompt_of(records[i])}{records[i]['output']}</s>"
        assert text == whole or (i + 1 == 265 and whole.startswith(text))
    spaced = [{"instruction": "a", "output": "  b </s> c"}]  # decoded by itself, the output would lose a space
    assert show_examples(job_of(folder, tmp_path, spaced), 1, False).endswith(":⟦  b </s>  c</s>⟧\n")


# --- show_examples ---


words = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="⟦⟧\ufffd"), max_size=12)


@settings(max_examples=50)
@given(
    records=st.lists(
        st.fixed_dictionaries({"instruction": words, "output": words}, optional={"input": words}),
        min_size=1,
        max_size=4,
    ),
    n=st.integers(1, 3),
    colour=st.booleans(),
    split=st.sampled_from([0, 50]),
)
def test_examples_are_shown_with_what_is_trained(model, records, n, colour, split, tmp_path_factory):
    """In the order of training: the prompt plain or dim, then output and end between the marks."""
    assume(not split or len(records) > 1)
    for record in records:
        assume(not record["output"].startswith(")"))  # would merge with the prompt
    folder = tmp_path_factory.mktemp("run")
    flags = ["--model_max_length", 4096, "--validation_split_percentage", split, "--num_train_epochs", 1]
    job = job_of(model, folder, records, *flags, "--per_device_train_batch_size", 2)
    order = [int(i) for k in range(job.order.updates) for micro in job.order.update(k) for i in micro[0]]
    held_out = round(len(records) * split / 100)
    expected = ""
    for i in order[:n]:
        record = records[held_out + i]
        prompt, answer = "<s>" + prompt_of(record), record["output"] + "</s>"
        whole = len(tokens(prompt_of(record) + record["output"])) + 1
        trained = whole - len(tokens(prompt_of(record)))
        title = f"example {i} (record {held_out + i + 1}): {whole:,} tokens, {trained:,} trained"
        text = f"\x1b[2m{prompt}\x1b[0m\x1b[32m{answer}\x1b[0m" if colour else f"{prompt}⟦{answer}⟧"
        expected += ("\n" if expected else "") + f"--- {title} ---\n{text}\n"
    assert show_examples(job, n, colour) == expected


def test_tokens_are_shown_as_numbers(model, tmp_path):
    record = {"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, 8]}
    text = "example 0 (record 1): 4 tokens, 2 trained ---\n5 6 ⟦7 8⟧\n"
    assert show_examples(job_of(model, tmp_path, [record], "--num_train_epochs", 1), 1, False) == "--- " + text


def test_no_more_examples_than_are_trained_on(model, tmp_path):
    job = job_of(model, tmp_path, make_records(3), "--num_train_epochs", 1)
    assert show_examples(job, 9, False).count("--- example") == 3


def test_half_a_character_and_escapes(model, tmp_path):
    """The limit cuts ☃ into bytes; the terminal's escapes in the data stay text."""
    records = [{"instruction": "a\x1b[31m", "output": "☃☃"}]
    cut = len(tokens(prompt_of(records[0]))) + 4
    shown = show_examples(job_of(model, tmp_path, records, "--model_max_length", cut), 1, True)
    assert "a\\x1b[31m" in shown and shown.endswith("\x1b[32m☃\x1b[0m\n")


def test_tokens_of_a_chat_are_named(model, tmp_path):
    """Special tokens besides the four, which decoding leaves out."""
    folder = copied(model, tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = {"content": "<turn>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"].append({"id": 260, **added, "special": True})
    write_json(folder / "tokenizer.json", tokenizer)
    write_model(folder, {**CONFIG, "vocab_size": 261})
    job = job_of(folder, tmp_path, [{"instruction": "a<turn>b", "output": "c<turn>d"}])
    assert "a<turn>b" in show_examples(job, 1, False)
    assert "⟦c<turn>d</s>⟧" in show_examples(job, 1, False)


def test_where_colour_is_wanted(tmp_path, monkeypatch):
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with (tmp_path / "file").open("w") as file:
        assert not wants_colour(file)
        assert wants_colour(Terminal())  # type: ignore[arg-type]
        monkeypatch.setenv("FORCE_COLOR", "1")
        assert wants_colour(file)


@pytest.mark.parametrize("factor", [None, 2.0])
def test_examples_past_the_models_positions(model, factor, tmp_path, capsys):
    """Warn once with count and longest, of evaluation too, unless a scaling covers them; the doctor names them."""
    folder = copied(model, tmp_path / "model")
    scaling = {"rope_scaling": {"type": "linear", "factor": factor}} if factor else {}
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "max_position_embeddings": 64, **scaling})
    lengths = [3, 64, 65, 90, 10, 70]
    records = [{"input_ids": [5] * n, "labels": [5] * n} for n in lengths]
    job = job_of(folder, tmp_path, records, "--validation_split_percentage", "50", "--eval_strategy", "epoch")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "positions of the model" in line]
    past = examine(job)["findings"]["past_positions"]
    if factor:
        assert warnings == [] and past == told([])
        return
    assert [line.partition("; ")[0] for line in warnings] == [
        f"warning: {count} {kind}examples are longer than the 64 positions of the model (max_position_embeddings), the "
        f"longest of {longest} tokens"
        for count, kind, longest in (("2 of 3", "", 90), ("1 of 3", "evaluation ", 65))
    ]
    assert past == told([4, 6])
    assert "longer than the 64 positions of the model" in dict(as_lines(examine(job)))["past positions"]
