"""Compare the bytes that a run will write with those that are free."""

from pathlib import Path

from llama_jax.base.errors import InputError


def check_space(
    output_dir: Path, *, free: int, checkpoint: int, export: int, saves: int, kept: int, limit: int | None
) -> str:
    """Return a warning where all checkpoints and the export do not fit, "" where they do. Raises InputError.

    `free`, `checkpoint` and `export` are bytes, `saves` the checkpoints that the run will write, and `kept` those in
    the folder that it goes on from. Of `limit` checkpoints (None or 0: all), the oldest is removed once the next is
    written. Without a limit, only a disk without room for two checkpoints and the export is refused.
    """
    most = min(saves, max(1, limit + 1 - kept)) if limit else saves
    refused = most if limit else min(most, 2)

    def line(count: int) -> str:
        written = f"{count} checkpoint(s) of {size(checkpoint)} and " if count else ""
        fix = f"lower --save_total_limit {limit}" if limit else "give --save_total_limit 1"
        fix = f"{fix}, " if count > 1 else ""
        return (
            f"output_dir {output_dir}: {written}the export of {size(export)} need {size(count * checkpoint + export)}, "
            f"and {size(free)} are free: make room, {fix}or choose another --output_dir"
        )

    if refused * checkpoint + export > free:
        raise InputError(line(refused))
    return line(most) if most * checkpoint + export > free else ""


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def size(number: int) -> str:
    """Return a number of bytes for people."""
    return f"{number / 2**30:,.2f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"
