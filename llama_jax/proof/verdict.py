"""Collect the rows of a certificate: what was compared, the error, its bound, and whether it holds."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama_jax.base.errors import plain
from llama_jax.base.files import dump_json, write_text
from llama_jax.proof.page import as_page
from llama_jax.reporting.page import finite

# By the name of a quantity and of a program, its value in each update.
Curves = dict[str, dict[str, list[float]]]
VALUES, PAGE = "parity.json", "parity.html"
SHOWN = 12  # rows of a section that are printed, if all hold


@dataclass(frozen=True)
class Row:
    """Hold one comparison. `error` and `bound` are None where values are equal or not, as token ids are. `holds` is
    None where nothing could be compared; `note` then tells why, and elsewhere what differs."""

    section: str
    name: str
    error: float | None
    bound: float | None
    holds: bool | None
    note: str = ""

    @property
    def verdict(self) -> str:
        """Return the row's verdict as a word."""
        return {True: "holds", False: "FAILS", None: "not compared"}[self.holds]

    @property
    def share(self) -> float:
        """Return the error as a share of its bound, 0 where there is none."""
        if self.error is None or self.bound is None:
            return 0.0
        return self.error / self.bound if self.bound else math.inf * bool(self.error)


def bounded(section: str, name: str, error: float, bound: float, note: str = "") -> Row:
    """Return the row of an error that should not exceed its bound. A NaN fails."""
    return Row(section, name, error, bound, error <= bound, note)


@dataclass
class Certificate:
    """Hold the rows of a comparison, and the facts by which a colleague repeats it: the command, versions of packages,
    digests of model, data and flags. `curves` are drawn on the page."""

    command: str
    versions: dict[str, str]
    digests: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    curves: Curves = field(default_factory=dict)

    @property
    def failed(self) -> list[Row]:
        """Return the rows that do not hold."""
        return [row for row in self.rows if row.holds is False]

    def verdict(self) -> str:
        """Return the verdict in one line."""
        return verdict_of(self.rows)

    def write(self, folder: Path) -> None:
        """Write `parity.json` and `parity.html` into a folder that exists."""
        values = finite({**dataclasses.asdict(self), "holds": not self.failed, "verdict": self.verdict()})
        write_text(folder / VALUES, dump_json(values) + "\n")
        write_text(folder / PAGE, as_page(values))


def verdict_of(rows: Sequence[Row]) -> str:
    """Return the verdict on rows in one line, with the first row of each section that fails."""
    failed = [row for row in rows if row.holds is False]
    if not failed:
        return f"parity: all {sum(row.holds is not None for row in rows):,} rows hold"
    first = {row.section: row for row in reversed(failed)}
    sections = dict.fromkeys(row.section for row in rows)
    named = "; ".join(f"{section}: {plain(first[section].name)}" for section in sections if section in first)
    return f"parity: {len(failed):,} of {len(rows):,} rows FAIL, in each section first: {named}"


def table(rows: Iterable[Row], most: int = SHOWN) -> str:
    """Return the rows of a section as text. Of more than `most`, rows that fail, then those nearest to their bounds."""
    rows = [replace(row, name=plain(row.name), note=plain(row.note)) for row in rows]
    shown = rows
    if len(rows) > most:
        nearest = sorted(rows, key=lambda row: (row.holds is not False, -row.share))[:most]
        shown = [row for row in rows if row in nearest]
    width = max(len(row.name) for row in shown)
    lines = [f"  {'':<{width}}  {'error':>9}  {'bound':>9}"] if any(row.bound is not None for row in shown) else []
    lines += [f"  {row.name:<{width}}  {_short(row.error)}  {_short(row.bound)}  {_told(row)}" for row in shown]
    if len(shown) < len(rows):
        held = sum(row.holds is True for row in rows if row not in shown)
        lines.append(f"  ... and {len(rows) - len(shown):,} rows more, {held:,} hold; {VALUES} has all")
    return "\n".join(lines)


def _told(row: Row) -> str:
    return row.verdict + (f": {row.note}" if row.note else "")


def _short(value: float | None) -> str:
    return f"{'':>9}" if value is None else f"{value:9.2e}"
