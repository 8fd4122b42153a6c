"""Read the page of a run in a real browser, and its values beside the run's own log."""

import json
import math
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_training import Job, stop_in_the_third_update
from tiny import ALPACA, ROOT, run, slow_unless, write_json, write_tokenizer

import train_jax
from llama_jax.base.errors import InputError
from llama_jax.base.secrets import without_secrets
from llama_jax.command import report
from llama_jax.reporting import run_report
from llama_jax.reporting.comparison import differences, read_log
from llama_jax.reporting.page import as_page
from llama_jax.reporting.run_report import PAGE, POINTS, VALUES, RunReport
from llama_jax.training import fit as fit_room

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NO_CHROMIUM = "no Chromium on this machine (apt-get install chromium); .ci/run installs one"
BAD = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job of text whose run, with evaluations, is in "whole"."""
    folder = tmp_path_factory.mktemp("job")
    job = Job(
        folder,
        **{"data_path": folder / "alpaca.json", "validation_split_percentage": 20, "eval_strategy": "steps"},
        **{"eval_steps": 2, "logging_steps": 1, "save_total_limit": 2},
    )
    write_json(folder / "alpaca.json", ALPACA * 5)
    write_tokenizer(folder / "model")
    job.train("whole")
    return job


def values(folder: Path) -> dict[str, Any]:
    return json.loads((folder / VALUES).read_text())


def logged(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


# -- The values -------------------------------------------------------------------------------------------------------


def test_values_of_a_run(job: Job) -> None:
    out = job.folder / "whole"
    found, log = values(out), logged(out)
    assert found["status"] == "finished" and found["updates"] == 6 and found["name"] == "whole"
    assert found["log_history"] == log
    speed = found["speed"]
    assert speed["step"] == [1, 2, 3, 4, 5, 6] and {len(points) for points in speed.values()} == {6}
    assert speed["tokens_per_second"][0] is None and all(rate > 0 for rate in speed["tokens_per_second"][1:])
    assert speed["mfu"] == [None] * 6, "no peak of a CPU is known"
    assert [c["step"] for c in found["checkpoints"]] == [2, 4, 6]
    assert [c["kept"] for c in found["checkpoints"]] == [False, True, True]
    seconds = found["summary"]["seconds"]
    assert seconds.keys() == {"start", "data", "weights and compile", "training", "evaluation", "saving", "export"}
    assert seconds["evaluation"] >= sum(e.get("eval_runtime", 0.0) for e in log) - 1e-3
    assert 0 < seconds["training"] < log[-1]["train_runtime"]
    assert found["model"]["attention"] == "blockwise" and found["model"]["blocks"] == "1x1280"
    assert found["flags"]["max_steps"] == 6 and "weight_decay" in found["flags"] and "bf16" not in found["flags"]
    spans = found["examples"][0]["spans"]
    assert any(trained for trained, _ in spans) and "".join(text for _, text in spans).startswith("<s>Below is")
    lengths = found["data"]["lengths"]
    assert sum(lengths["counts"]) == found["data"]["examples"] == len(ALPACA) * 4
    assert dict(found["data"]["lines"])["duplicates"].startswith(f"{found['data']['examples'] - len(ALPACA)} (record")


def test_a_resumed_run_goes_on(job: Job) -> None:
    """Points after the checkpoint are those of the new start."""
    out = job.folder / "resumed"
    shutil.copytree(job.folder / "whole", out)
    shutil.rmtree(out / "checkpoint-6")
    for name in ("model.safetensors", "config.json"):
        (out / name).unlink()
    marked = values(out)
    marked["speed"]["memory"] = [1] * 6
    write_json(out / VALUES, marked)
    job.train("resumed", resume_from_checkpoint=True)
    found = values(out)
    assert found["speed"]["step"] == [1, 2, 3, 4, 5, 6]
    assert [at == 1 for at in found["speed"]["memory"]] == [True] * 4 + [False] * 2
    assert [c["step"] for c in found["checkpoints"]] == [2, 4, 6]


@pytest.mark.parametrize("damage", ["", "[]", '{"speed": {}}', '{"speed": 1, "checkpoints": 2}'])
def test_a_damaged_report_is_begun_anew(job: Job, damage: str, tmp_path: Path) -> None:
    (tmp_path / VALUES).write_text(damage)
    begun = RunReport(tmp_path, {"name": "x", "log_history": []}, dict)
    begun.resume(4)
    begun.begin()
    begun.end("finished", 60)
    assert values(tmp_path)["speed"] == {name: [] for name in POINTS}


def test_a_page_without_news_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After the seconds that the page before it names; the waits of this test pass at once."""
    named: list[float] = []
    waits = [0.0]

    class AtOnce(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits[-1] += math.inf if timeout is None else timeout
            return self.is_set()

    def keep(path: Path, text: str) -> None:
        if path.name == VALUES:
            named.append(json.loads(text)["next_within"])
            waits.append(0.0)
            if len(named) == 5:
                begun._ended.set()

    monkeypatch.setattr(run_report, "write_text", keep)
    monkeypatch.setattr(run_report, "SHARE", 1.0)  # no write takes more than `EVERY` of seconds
    begun = RunReport(tmp_path, {"name": "x", "log_history": []}, dict)
    begun._changed, begun._ended = AtOnce(), AtOnce()
    begun._work()
    assert named == [70.0] * 6 and waits[2:-1] == [70.0] * 4


def test_ends_other_than_the_last_update(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal, and an error of the run."""

    def failing(*_: Any, **__: Any) -> Any:
        raise ValueError("the reason\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(fit_room, "make_update", failing)
        with pytest.raises(ValueError, match="the reason"):
            train_jax.main(job.argv("failed"))
    assert values(job.folder / "failed")["status"] == "failed: ValueError: the reason"
    stop_in_the_third_update(monkeypatch)
    outcome = run(train_jax.main, *job.argv("stopped"))
    assert outcome.code == 143, outcome.err
    assert values(job.folder / "stopped")["status"] == "stopped"


@pytest.mark.slow
def test_a_page_that_cannot_be_written_ends_nothing(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_report, "write_text", full)
    outcome = run(train_jax.main, *job.argv("unwritten"))
    assert outcome.code == 0 and outcome.err.count("report.html is not written any more: OSError: [Errno 28]") == 1
    assert not (job.folder / "unwritten" / PAGE).exists() and "page: " not in outcome.err


def test_secrets_are_left_out() -> None:
    argv = ["python", "train_jax.py", "--hub_token", "hf_1", "--hub_token=hf_2", "--trackio_space_id", "a", "--fp16"]
    shown = without_secrets(argv)
    assert shown == [*argv[:3], "***", "--hub_token=***", *argv[5:]]
    assert without_secrets(["x", "--push_to_hub_token", "--bf16"]) == ["x", "--push_to_hub_token", "--bf16"]
    for flag in ("--hub-token", "--hub_tok", "--hub-tok", "--push_to_hub_token"):  # as argparse takes them
        assert "hf_1" not in " ".join(without_secrets(["x", flag, "hf_1", f"{flag}=hf_1"]))
    url = "https://me:pw@host/d.json?sig=abc#part"
    assert without_secrets(["x", "--data_path", url, "gs://b/o"])[2:] == ["https://host/d.json?***#part", "gs://b/o"]
    assert without_secrets(["x", "--tokenizer_name", "a", "--num_tokens", "3"])[2::2] == ["a", "3"]


# -- Comparison -------------------------------------------------------------------------------------------------------

NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=32)
LOGS = st.lists(
    st.fixed_dictionaries({"step": st.integers(1, 6)}, optional={"loss": NUMBERS, "grad_norm": NUMBERS}), max_size=8
)


@given(LOGS, LOGS)
def test_differences(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """By trying each step: the last value of each log counts there, and NaN compares with nothing."""
    found = differences(ours, theirs)
    for key in ("loss", "grad_norm"):
        largest = -1.0
        for step in range(1, 7):
            a, b = ([e[key] for e in log if e["step"] == step and key in e] for log in (ours, theirs))
            if a and b and not math.isnan(a[-1] - b[-1]):
                largest = max(largest, abs(a[-1] - b[-1]))
        assert (key in found) == (largest >= 0)
        if key in found:
            d = found[key]
            assert d["difference"] == largest == abs(d["ours"] - d["theirs"])


@pytest.mark.slow
def test_a_line_before_the_first_update_of_a_resume(job: Job) -> None:
    """A checkpoint at an epoch's end is saved before the epoch's line, which the resumed run then writes at once."""
    changes = {"logging_strategy": "epoch", "save_steps": 1, "max_steps": -1, "num_train_epochs": 2}
    changes |= {"save_total_limit": 20, "eval_strategy": "no", "gradient_accumulation_steps": 1}
    whole = job.train("epochs", **changes)
    ends = [entry["step"] for entry in logged(whole) if "loss" in entry]
    assert len(ends) == 2
    for step in ends:
        out = job.folder / f"epochs-{step}"
        shutil.copytree(whole, out)
        for later in out.glob("checkpoint-*"):
            if int(later.name[11:]) > step:
                shutil.rmtree(later)
        for path in out.glob("model*"):
            path.unlink()
        (out / "config.json").unlink()
        outcome = run(train_jax.main, *job.argv(out.name, **changes, resume_from_checkpoint=True))
        assert outcome.code == 0, outcome.err


def test_compare_with(job: Job) -> None:
    """A log of the HF Trainer's schema lies over the run's, and the largest difference is named."""
    state = json.loads((job.folder / "whole" / "trainer_state.json").read_text())
    entry = [entry for entry in state["log_history"] if "loss" in entry][2]
    entry["loss"] += 0.25
    other = write_json(job.folder / "other.json", state)
    step = entry["step"]
    outcome = run(train_jax.main, *job.argv("compared", compare_with=other))
    assert outcome.code == 0, outcome.err
    line = next(line for line in outcome.err.splitlines() if " loss differs" in line)
    assert re.fullmatch(
        rf"compared with \S+/other.json: loss differs by at most 0.25, at update {step}: .* there", line
    )
    assert any("learning_rate differs by at most 0, at" in line for line in outcome.err.splitlines())
    assert values(job.folder / "compared")["compare"]["log_history"] == state["log_history"]


@pytest.mark.parametrize("text", ["{}", "[1]", '{"log_history": [{"loss": 1}]}', "{", None])
def test_no_log_to_compare_with(job: Job, text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "trainer_state.json"
    if text is not None:
        path.write_text(text)
    outcome = run(train_jax.main, *job.argv("refused", compare_with=path))
    assert outcome.code == 2 and outcome.compiled == 0 and str(path) in outcome.err.splitlines()[-1]
    assert not (job.folder / "refused" / "model.safetensors").exists()


# -- The command ------------------------------------------------------------------------------------------------------


def test_pages_of_finished_runs(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, and folders of the HF Trainer, which keeps its log in checkpoints alone while it trains."""
    monkeypatch.chdir(tmp_path)
    state = job.folder / "whole" / "trainer_state.json"
    for step in (8, 30, 4):
        (folder := tmp_path / "theirs" / f"checkpoint-{step}").mkdir(parents=True)
        write_json(folder / "trainer_state.json", {**json.loads(state.read_text()), "max_steps": step})
    assert run_report.read_report(tmp_path / "theirs")["updates"] == 30
    outcome = run(report.main, "theirs")
    assert outcome.code == 0 and outcome.out == f"theirs/{PAGE}\n" and (tmp_path / "theirs" / PAGE).is_file()
    outcome = run(report.main, "theirs", job.folder / "whole", "--compare_with", state, "--output_file", "both.html")
    assert outcome.code == 0 and outcome.out == "both.html\n"
    page = (tmp_path / "both.html").read_text()
    runs = json.loads(re.findall('<script id="runs" type="application/json">(.*)</script>', page)[0])
    assert [r["name"] for r in runs] == ["theirs", "whole"]
    assert runs[0]["differences"]["loss"]["difference"] == 0.0
    assert run(report.main, "theirs", job.folder / "whole").out == f"{PAGE}\n"


@pytest.mark.slow
def test_the_commands_of_the_docs(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/watching.md, from a folder with the files that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "HF_DIR").symlink_to(job.folder / "model")
    (tmp_path / "my_data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ALPACA * 5))
    (tmp_path / "other_model").symlink_to(job.folder / "whole")
    text = (ROOT / "docs" / "watching.md").read_text(encoding="utf-8").replace("\\\n", "")
    commands = [line.split() for line in text.splitlines() if line.startswith("python ")]
    assert [words[1:3] for words in commands if words[1] == "-m"] == [["-m", "llama_jax.report"]] * 2
    for words in commands:
        if words[1] == "-m":
            assert run(report.main, *words[3:]).code == 0
        else:
            few = "--use_cpu True --max_steps 14 --logging_steps 5 --eval_steps 7 --save_strategy no".split()
            outcome = run(train_jax.main, *words[2:], *few, "--overwrite_output_dir", True)
            assert outcome.code == 0, outcome.err
    assert (tmp_path / "my_model" / "profile").is_dir() and (tmp_path / "both.html").is_file()


def test_no_page(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text('{"log_history": 1}')
    write_json(tmp_path / VALUES, {"log_history": []})  # without a name: another program's
    for argv, named in (
        (["nowhere"], "nowhere: has neither report.json nor a trainer_state.json"),
        ([tmp_path], f"{tmp_path / 'trainer_state.json'}: has no log_history"),
        ([], "OUTPUT_DIR"),
    ):
        outcome = run(report.main, *argv)
        assert outcome.code == 2 and named in outcome.err.splitlines()[-1]
    write_json(tmp_path / "trainer_state.json", {"log_history": []})
    outcome = run(report.main, tmp_path, "--output_file", tmp_path / "no" / "page.html")
    assert outcome.code == 2 and "no/page.html cannot be written" in outcome.err


# -- In a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip(NO_CHROMIUM)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def made_run(name: str = "run", status: str = "finished") -> dict[str, Any]:
    """A run with each part of a page, and long words and markup in each text."""
    rng, steps = np.random.default_rng(0), list(range(1, 201))
    log: list[dict[str, Any]] = [
        {"step": k, "loss": 2 * k**-0.2 + rng.normal() / 20, "grad_norm": 1.0, "learning_rate": 1e-5} for k in steps
    ]
    log[20]["loss"] = math.nan
    log += [{"step": k, "eval_loss": 2 * k**-0.2, "eval_runtime": 1.0, "eval_arc_easy_acc": 0.5} for k in (100, 200)]
    log.append({"step": 40, "skipped_updates": 1, "skipped_records": [3, 4]})
    word = BAD + "x" * 300
    return {
        "name": name,
        "status": status,
        "written": 1.7e9,
        "updates": 200,
        "log_history": log,
        "speed": {
            **{"step": steps, "grad_norm": [1.0] * 200, "tokens_per_second": [None, *[5000.0] * 199]},
            **{"mfu": [None, *[0.4] * 199], "memory": [2**36] * 200},
        },
        "checkpoints": [{"step": 100, "bytes": 2**35, "seconds": 1.5, "kept": True}],
        "prompts": [word, "What?"],
        "answers": [{"step": k, "texts": [f"answer {k} " + word, word]} for k in (50, 100, 150, 200)],
        "compare": {"name": word, "log_history": [{"step": 3, "loss": 1.0}]},
        "data": {
            **{"form": "alpaca", "examples": 7, "lines": [["truncated", word]]},
            "lengths": {
                **{"edges": [1, 2, 4, 8], "counts": [1, 2, 4]},
                "percentiles": {"0": 1, "50": 4, "90": 7, "99": 7, "100": 7},
            },
        },
        "examples": [{"title": "example 0", "spans": [[False, "prompt " + word], [True, "answer"]]}],
        "command": "python train_jax.py --x " + word,
        "flags": {"path": word},
        "model": {"parameters": 7e9},
        "device": {"platform": "gpu", "memory": 2**37},
        "versions": {"jax": "0.10"},
        "summary": {"seconds": {"training": 4000.0}, "compiled_in": 3.0, "tokens_per_second": 5.0, "mfu": 0.4},
        "profile": {"updates": "10:13", "rows": [["matmul", 80.0, 0.8], ["idle", 20.0, 0.2]]},
    }


def opened(browser: Any, file: Path, width: int, scheme: str) -> tuple[Any, list[str]]:
    """Open a page; return it with what it logs, raises and asks of a network."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    local = ("file:", "data:", "blob:")
    page.on("request", lambda request: request.url.startswith(local) or problems.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_function("document.querySelectorAll('.chart svg').length > 0")
    return page, problems


@pytest.mark.parametrize(
    ("width", "scheme", "several"),
    [
        (360, "dark", True),
        slow_unless(False, 360, "light", False),
        slow_unless(False, 1440, "light", True),
        (1440, "dark", False),
    ],
)
def test_it_renders(browser: Any, width: int, scheme: str, several: bool, tmp_path: Path) -> None:
    """Nothing overflows, raises or leaves; texts of a run stay texts."""
    runs = [made_run(), made_run("other run")] if several else [made_run(BAD)]
    (tmp_path / PAGE).write_text(as_page(runs))
    page, problems = opened(browser, tmp_path / PAGE, width, scheme)
    for part in page.query_selector_all("details"):
        part.evaluate("part => part.open = true")
    page.wait_for_timeout(300)
    assert problems == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    beyond = page.evaluate(
        """width => [...document.querySelectorAll('main *')].filter(e => !e.closest('.wide') && !e.closest('svg')
        && e.getBoundingClientRect().right > width + 1).map(e => e.outerHTML.slice(0, 100))""",
        width,
    )
    assert beyond == []
    assert page.title() != "broken" and page.query_selector("main img") is None
    names = page.evaluate("[...document.querySelectorAll('.charts h3')].map(e => e.textContent)")
    assert names == ["loss", "learning rate", "grad norm", "tokens per second", "MFU", "arc_easy_acc"]
    drawn = page.evaluate(
        "[...document.querySelectorAll('.chart')].map(e => e.querySelectorAll('path.js-line').length)"
    )
    assert all(count >= 1 for count in drawn[:5]), drawn
    text = page.inner_text("main")
    for expected in ("200 of 200", "answer 50", "answer 200", "3, 4", "checkpoint-100", "32 GiB", "1:06:40 h"):
        assert expected in text, expected
    assert page.locator(".trained").first.inner_text() == "answer"
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back)[:3])) > 380) == (scheme == "light")
    page.close()


def test_controls(browser: Any, tmp_path: Path) -> None:
    """Logarithmic axes, smoothing against its formula, hover values, zoom, the copied command."""
    (tmp_path / PAGE).write_text(as_page([values := made_run()]))
    page, problems = opened(browser, tmp_path / PAGE, 1440, "light")
    chart = "document.getElementById('chart loss')"
    assert page.evaluate(f"{chart}.layout.yaxis.type") == "linear"
    page.check("#log")
    assert page.evaluate(f"{chart}.layout.yaxis.type") == "log"
    page.uncheck("#log")
    page.fill("#smooth", "0.9")
    drawn = page.evaluate(f"{chart}.data.map(t => Array.from(t.y))")
    losses = [entry["loss"] for entry in values["log_history"] if not math.isnan(entry.get("loss", math.nan))]
    assert drawn[0] == losses, "the line itself stays, faint"
    weights = [0.1 * 0.9**i for i in range(len(losses))]
    expected = [np.dot(weights[: n + 1][::-1], losses[: n + 1]) / sum(weights[: n + 1]) for n in range(len(losses))]
    np.testing.assert_allclose(drawn[1], expected, rtol=1e-12)
    page.fill("#smooth", "0")
    box = page.locator("[id='chart loss'] .nsewdrag").first.bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.move(middle[0] + 2, middle[1])
    page.wait_for_selector("[id='chart loss'] .hoverlayer text")
    assert "train" in page.locator("[id='chart loss'] .hoverlayer").first.text_content()
    page.mouse.down()
    page.mouse.move(middle[0] + 200, middle[1] + 5, steps=5)
    page.mouse.up()
    page.wait_for_function(f"{chart}._fullLayout.xaxis.range[0] > 50", timeout=5000)
    browser.contexts[-1].grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("button.copy")
    page.wait_for_function("document.querySelector('button.copy').textContent == 'copied'")
    assert page.evaluate("navigator.clipboard.readText()") == values["command"]
    assert problems == []
    page.close()


def test_the_page_of_a_real_run(browser: Any, job: Job) -> None:
    page, problems = opened(browser, job.folder / "whole" / PAGE, 1440, "light")
    assert problems == []
    drawn = page.evaluate("document.getElementById('chart loss').data.map(t => [Array.from(t.x), Array.from(t.y)])")
    log = logged(job.folder / "whole")
    for key, (x, y) in zip(("loss", "eval_loss"), drawn, strict=True):
        assert list(zip(x, y, strict=True)) == [(e["step"], e[key]) for e in log if key in e]
    page.close()


def test_a_running_page_is_read_again(browser: Any, tmp_path: Path) -> None:
    """Every 30 s, by a clock that the test moves; a zoomed page stays."""
    (tmp_path / PAGE).write_text(as_page([made_run(status="running")]))
    page = browser.new_page()
    page.clock.install(time=0)
    page.clock.pause_at(1000)  # an installed clock goes on by itself: a slow machine would reload early
    page.goto((tmp_path / PAGE).as_uri())
    page.evaluate("window.mark = 1")
    page.clock.run_for(29_000)
    assert page.evaluate("window.mark") == 1
    with page.expect_event("load"):
        page.clock.run_for(2_000)
    assert page.evaluate("window.mark === undefined")
    page.close()


def test_a_page_tells_a_run_that_may_be_dead(browser: Any, tmp_path: Path) -> None:
    """Once it is late five times over, on a zoomed page too; a finished run, and one without times, say nothing."""
    told = "nothing is written since: the run may have been killed"
    runs = [made_run("a", "running"), made_run("b", "finished"), made_run("c", "running")]
    for made, more in zip(runs, ({"next_within": 70.0}, {"next_within": 70.0}, {}), strict=True):
        made |= {"written": 1000.0, **more}
    (tmp_path / PAGE).write_text(as_page(runs))
    page = browser.new_page()
    page.clock.install(time=0)
    page.clock.pause_at(1000 + 5 * 70 - 20)
    page.goto((tmp_path / PAGE).as_uri())
    said = "[...document.querySelectorAll('main > p.quiet')].map(e => e.textContent)"
    before = page.evaluate(said)
    assert [line[:3] for line in before] == ["a: ", "b: ", "c: "] and not any(told in line for line in before)
    page.check("#log")  # such a page is not read again
    page.evaluate("window.mark = 1")
    page.clock.run_for(31_000)
    assert page.evaluate(said) == [f"{before[0]}; {told}", *before[1:]] and page.evaluate("window.mark") == 1
    page.reload()
    assert page.evaluate(said) == [f"{before[0]}; {told}", *before[1:]]
    page.close()


def test_a_log_without_a_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_log(tmp_path / "none.json")
