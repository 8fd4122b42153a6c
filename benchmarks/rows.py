"""Hold what a check found: errors beside their bounds."""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Row(NamedTuple):
    """Name what was compared, and give each error with the bound that it should stay below."""

    name: str
    errors: dict[str, tuple[float, float]]

    @property
    def fine(self) -> bool:
        """Return whether every error is below its bound; NaN is not."""
        return all(error < bound for error, bound in self.errors.values())

    def __str__(self) -> str:
        errors = ", ".join(f"{of} {error:.1e} (< {bound:.1e})" for of, (error, bound) in self.errors.items())
        return f"{self.name}: off by: {errors}{'' if self.fine else '  WRONG'}"

    def as_json(self) -> dict[str, Any]:
        errors = {of: {"error": error, "bound": bound} for of, (error, bound) in self.errors.items()}
        return {"name": self.name, "fine": self.fine, "errors": errors}


def all_fine(rows: Iterable[Row]) -> bool:
    """Print rows as they come, and return whether all are fine."""
    good = True
    for row in rows:
        print(row, flush=True)
        good &= row.fine
    return good
