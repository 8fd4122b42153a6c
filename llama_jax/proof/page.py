"""Make the page of a certificate: one HTML file that needs no network."""

import html
import json
from pathlib import Path
from typing import Any

from llama_jax.reporting.page import finite

TEMPLATE = Path(__file__).with_name("page.html")
LONG = 24  # rows that are folded up, if all hold
_WORDS = {True: "holds", False: "fails", None: "not compared"}


def as_page(values: dict[str, Any]) -> str:
    """Return the HTML of a certificate, given by the values of `parity.json`."""
    from plotly import offline

    sections: dict[str, list[dict[str, Any]]] = {}
    for row in values["rows"]:
        sections.setdefault(row["section"], []).append(row)
    curves = values["curves"]
    parts = {
        "CLASS": "holds" if values["holds"] else "fails",
        "VERDICT": html.escape(values["verdict"]),
        "COMMAND": html.escape(values["command"]),
        "FACTS": "".join(
            f"<tr><td>{html.escape(name)}<td>{html.escape(_plain(value))}"
            for name, value in {**values["versions"], **values["digests"]}.items()
        ),
        "TABLES": "".join(_table(name, rows) for name, rows in sections.items())
        + "".join(f'<h2>{name} of each update</h2><div class="curve" data-name="{name}"></div>' for name in curves),
        # No text of a model can end the script: "<" stands for itself in JSON's strings alone.
        "DATA": json.dumps(finite(sections)).replace("<", "\\u003c"),
        "CURVES": json.dumps(finite(curves)),
        "PLOTLY": offline.get_plotlyjs(),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    before, *rest = text.split("/*-")
    pieces = [before]
    for piece in rest:
        name, after = piece.split("-*/", 1)
        pieces += [parts[name], after]
    return "".join(pieces)


def _table(name: str, rows: list[dict[str, Any]]) -> str:
    body = "".join(
        f'<tr class="{_WORDS[row["holds"]].split()[0]}"><td>{html.escape(row["name"])}<td>{_number(row["error"])}'
        f"<td>{_number(row['bound'])}<td>{_WORDS[row['holds']]}<td>{html.escape(row['note'])}"
        for row in rows
    )
    head = "<tr><th><th>error<th>bound<th>verdict<th>"
    title = html.escape(name)
    whole = f'<div class="wide"><table>{head}{body}</table></div>'
    if len(rows) > LONG:
        is_open = " open" if any(row["holds"] is False for row in rows) else ""
        whole = f"<details{is_open}><summary>{len(rows):,} rows</summary>{whole}</details>"
    return f'<h2>{title}</h2><div class="plot" data-section="{title}"></div>{whole}'


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
