"""Make the page of one run or several: one HTML file that needs no network."""

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from llama_jax.reporting.comparison import differences

TEMPLATE = Path(__file__).with_name("page.html")


def as_page(runs: Sequence[dict[str, Any]]) -> str:
    """Return the HTML of a page with the values of `RunReport` of each run."""
    shown = []
    for run in runs:
        other = run.get("compare")
        found = differences(run["log_history"], other["log_history"]) if other else {}
        shown.append({**run, "differences": found})
    # No text of a run can end the script: "<" stands for itself in JSON's strings alone.
    data = json.dumps(finite(shown), separators=(",", ":")).replace("<", "\\u003c")
    title = " ".join(str(run["name"]) for run in runs) or "llama_jax"
    head, rest = _template().split("<!--TITLE-->")
    before, after = rest.split("/*DATA*/")
    return "".join([head, _escaped(title), before, data, after])


@cache
def _template() -> str:
    """Return the template with the plotting library in its place."""
    from plotly.offline import get_plotlyjs

    before, after = TEMPLATE.read_text(encoding="utf-8").split("/*PLOTLY*/")
    return before + get_plotlyjs() + after


def finite(value: Any) -> Any:
    """Replace NaN and Inf, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
