"""Find the data that a flag names: files, patterns, folders, datasets of the hub, URLs.

`datasets` finds the files of folders and reads save_to_disk folders and datasets of the hub; fsspec opens URLs.
"""

import glob
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_jax.base.bucket import local_path
from llama_jax.base.errors import InputError
from llama_jax.base.files import check_regular, read_json_object, refuse_holes
from llama_jax.data.readers import (
    COMPRESSED,
    KINDS,
    SUFFIXES,
    Reader,
    Table,
    copy_in,
    import_datasets,
    one_line,
    open_file,
    suffix_of,
)

_SPLIT = re.compile(r"(.+?):([\w.+-]+(?:\[[^/]*\])?)")
_HUB_NAME = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")


@dataclass(frozen=True)
class Source:
    """Hold a file of records, or a table of `datasets`; the bytes of `files` decide the records."""

    name: str
    files: tuple[Path, ...]
    table: Any = None

    @property
    def fingerprint(self) -> str:
        """Name the rows of a table among those of its files."""
        return "" if self.table is None else self.table._fingerprint

    def open(self, columns: set[str]) -> "Reader":
        """Return the records; of tables, only these columns. Raises InputError."""
        if self.table is not None:
            return Table(self.name, self.table, columns)
        try:
            return open_file(self.name, self.files[0], columns)
        except OSError as e:
            raise InputError(f"{self.name}: cannot be read: {e.strerror or e}") from None


def find_sources(
    names: Sequence[str], config: str | None = None, say: Callable[[str], None] = lambda line: None
) -> list[Source]:
    """Return the data that each name stands for, in this order. `say` receives a warning of files of a folder that
    `datasets` does not read. Raises InputError.

    A name is a file, a pattern of files, a folder, a URL of fsspec, or a dataset of the hub, `config` its
    configuration. A split follows a folder or dataset after a colon, by default `train`, or the only one.
    """
    return [source for name in names for source in _find(name, config, say)]


def _find(name: str, config: str | None, say: Callable[[str], None]) -> list[Source]:
    if "://" in name:
        return _download(name)
    path, split, named = local_path(name), None, None
    if not path.exists() and (named := _SPLIT.fullmatch(name)):
        path, split = local_path(named[1]), named[2]
    if path.is_dir():
        return _folder(path, split, config, say)
    if path.exists():
        if split:
            raise InputError(f"{name}: {path} is a file, which has no splits; leave :{split} out")
        return [_file(path)]
    if any(c in name for c in "*?[") and not split:
        found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not (files := [file for file in found if file.is_file()]):
            raise InputError(f"{name}: no file matches this pattern")
        return [_file(file) for file in files]
    dataset = named[1] if named else name
    if _HUB_NAME.fullmatch(dataset) and not dataset.endswith((*SUFFIXES, *COMPRESSED)):
        return [_hub(dataset, split, config)]
    raise InputError(f"{path}: no such data file")


def _file(path: Path) -> Source:
    """Return a local file. Raises InputError for a FIFO, a device, or a file of unwritten bytes."""
    check_regular(path)
    try:
        refuse_holes(path)
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from None
    return Source(str(path), (path,))


def _folder(path: Path, split: str | None, config: str | None, say: Callable[[str], None]) -> list[Source]:
    """Return the data of a folder: of save_to_disk, or files by the rules of `load_dataset`. Raises InputError."""
    _check_folder(path)
    datasets = import_datasets()
    saved = [(path / name).is_file() for name in ("dataset_dict.json", "state.json")]
    try:
        if any(saved):
            found = datasets.load_from_disk(str(path))
            parts = found if saved[0] else {"train": found}
            for part in parts.values():
                part.data.table.validate(full=True)  # else a wrong offset would read other memory
            splits = {name: [_table(str(path) + f":{name}" * saved[0], part)] for name, part in parts.items()}
        else:
            files = datasets.load_dataset_builder(str(path), config).config.data_files or {}
            splits = {str(name): [_file(Path(file)) for file in some] for name, some in files.items()}
    except InputError:
        raise
    except Exception as e:  # `datasets` raises many classes
        inside = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
        raise InputError(f"{path}: is a folder in which no data is found ({one_line(e)}); it holds {inside}") from None
    name = split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if name not in splits:
        raise InputError(f"{path}: has no split {name!r}, but {', '.join(splits) or 'none'}; give {path}:SPLIT")
    for source in splits[name]:
        if source.table is None and suffix_of(source.files[0]) not in SUFFIXES:
            raise InputError(f"{source.name}: not {KINDS}; name the data file of its folder")
    kinds = {suffix_of(source.files[0]) for some in splits.values() for source in some if source.table is None}
    if kinds and (left := [file for file in _data_files(path) if suffix_of(file) not in kinds]):
        some = ", ".join(map(str, left[:3])) + ", ..." * (len(left) > 3)
        say(f"warning: of a folder, files of one kind are read; left out: {some}; name a file to read it")
    return splits[name]


def _data_files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that may hold records: no hidden ones, and no dataset_infos.json."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        if suffix_of(path) in SUFFIXES and not hidden and not path.name.startswith("dataset_info") and path.is_file():
            yield path


def _check_folder(path: Path) -> None:
    """Check that a folder of save_to_disk names no file outside of itself. Raises InputError."""
    for file in sorted([*path.glob("state.json"), *path.glob("*/state.json")]):
        listed = read_json_object(file).get("_data_files")
        names = [about.get("filename") if isinstance(about, dict) else about for about in _as_list(listed)]
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise InputError(f"{file}: names the data file {str(name)[:60]!r}, should be a plain file name")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _hub(name: str, split: str | None, config: str | None) -> Source:
    """Load a dataset of the hub, from the cache where it is there. Raises InputError."""
    datasets = import_datasets()
    try:
        return _table(name, datasets.load_dataset(name, config, split=split or "train"))
    except (ConnectionError, FileNotFoundError) as e:
        raise InputError(
            f"{name}: no such file or folder, and no dataset of this name is in the local Hugging Face cache or "
            f"reached on the hub ({one_line(e)})"
        ) from None
    except Exception as e:  # an unknown split or configuration, a dataset with code
        fix = "; name it by --dataset_config_name" if "onfig name" in str(e) else ""
        raise InputError(f"{name}: cannot be loaded from the hub ({one_line(e)}){fix}") from None


def _download(url: str) -> list[Source]:
    """Copy the files of a URL, perhaps with a pattern, to this machine. Raises InputError."""
    from fsspec.core import url_to_fs

    try:
        system, place = url_to_fs(url)
        remote = sorted(system.glob(place)) if any(c in place for c in "*?[") else [place]
        if not remote:
            raise InputError(f"{url}: no file matches this pattern")
        sources = []
        for place in remote:
            with system.open(place, "rb") as file:
                copied = copy_in(file, Path(place).name)
            sources.append(Source(url if len(remote) == 1 else system.unstrip_protocol(place), (copied,)))
        return sources
    except (ImportError, ValueError) as e:  # the client is missing, or nobody knows the protocol
        raise InputError(f"{url}: cannot be read: {one_line(e)}") from None
    except OSError as e:
        raise InputError(f"{url}: cannot be read: {e.strerror or one_line(e)}") from None


def _table(name: str, table: Any) -> Source:
    return Source(name, tuple(Path(file["filename"]) for file in table.cache_files), table)
