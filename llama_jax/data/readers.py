"""Read the records of a file or table on access.

Plain JSON and JSONL are read here: `datasets` 5.2 refuses JSONL whose keys appear first after 10 MB, reads dates as
timestamps, drops half surrogate pairs, and takes 2,850 bytes a record for a JSON array. `datasets` reads `.arrow` and
CSV, and fsspec opens compressed files.
"""

import math
import mmap
import re
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, overload

from llama_jax.base.errors import InputError
from llama_jax.base.files import parse_json

Record = dict[str, Any]

KINDS = "a JSON array, JSONL (an object a line), parquet, .arrow, .csv or .txt"
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".txt")

_AT_ONCE = 32 << 20  # bytes of a dictionary's values to hold
_DICTIONARY_PAGE = 2  # the type's number
_FEW = 100_000  # rows that any file may have
_BLANK = b" \t\r\n"  # JSON's white space; Python's has more
_BOM = b"\xef\xbb\xbf"
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
# Match up to the next bracket or comma of JSON; an object of plain values is skipped whole.
_MARK = re.compile(rb'(?:[^]["{},]++|%s|\{(?:[^]["{}]++|%s)*+\})*+[][{},]' % (_STRING, _STRING), re.DOTALL)
EXPANDED, GROWTH = 256 << 20, 200  # bytes that any file may expand to, and bytes more for each of its bytes
LONGEST = 64 << 20  # bytes of a record
_ROWS = 1000  # rows of a table to hold as Python objects at a time


class Reader(Sequence[Record]):
    """Read records on access."""

    _name: str

    def scan(self) -> Iterator[Any]:
        """Yield each record, or the InputError of a record that cannot be parsed."""
        raise NotImplementedError

    def cut(self, part: slice) -> "Reader":
        """Return a part, in contiguous order."""
        raise NotImplementedError

    def where(self, i: int) -> tuple[str, int]:
        """Return the source of record i of all records, and the record's number there, from 1."""
        return self._name, i + 1

    @overload
    def __getitem__(self, i: int) -> Record: ...
    @overload
    def __getitem__(self, i: slice) -> "Reader": ...
    def __getitem__(self, i: int | slice) -> "Record | Reader":
        if isinstance(i, slice):
            return self.cut(i)
        at = range(len(self))[i]
        return next(iter(self.cut(slice(at, at + 1))))

    def __iter__(self) -> Iterator[Record]:
        for record in self.scan():
            if isinstance(record, InputError):
                raise record
            yield record


class Lines(Reader):
    """Read records that are lines, parsing each."""

    def __init__(
        self,
        name: str,
        path: Path,
        parse: Callable[[bytes, str, int], Any],
        starts: "array[int]",
        sizes: "array[int]",
    ):
        self._name, self._path, self._parse, self._starts, self._sizes = name, path, parse, starts, sizes

    def __len__(self) -> int:
        return len(self._starts)

    def cut(self, part: slice) -> "Lines":
        return type(self)(self._name, self._path, self._parse, self._starts[part], self._sizes[part])

    def scan(self) -> Iterator[Any]:
        try:
            with self._path.open("rb") as file, self._path.open("rb") as before:
                number = 1  # of the line where `before` is
                for i, (start, size) in enumerate(zip(self._starts, self._sizes, strict=True)):
                    file.seek(start)
                    line = file.read(size)
                    try:
                        record = present(self._parse(line, self._name, 1))
                    except InputError:
                        while before.tell() < start:
                            before.readline()
                            number += 1
                        record = self._problem(line, number, i)
                    yield record
        except OSError as e:
            raise InputError(f"{self._name}: cannot be read: {e.strerror}") from None

    def _problem(self, line: bytes, number: int, i: int) -> InputError:
        """Return the InputError of a bad line, by its number in the file."""
        try:
            self._parse(line, self._name, number)
        except InputError as e:
            if number > 1 or self._parse is _parse_text:
                return e
            # The file may not be JSONL at all.
            if line.lstrip().startswith(b"{") and (keys := _keys_of_one(self._path)) is not None:
                one = f"{self._name}: holds one object of several lines (its keys: {', '.join(keys) or 'none'})"
                return InputError(f"{one}; should be a JSON array, or JSONL (an object a line)")
            return InputError(f"{e}; should be {KINDS}")
        raise AssertionError("the file has changed")


class Elements(Lines):
    """Read records that are the elements of a JSON array, parsing each."""

    def __iter__(self) -> Iterator[Record]:
        for record in self.scan():
            if isinstance(record, InputError):
                self.refuse()
            yield record

    def refuse(self) -> None:
        """Raise the InputError of an array with a bad element: parsing the whole file finds line and column."""
        _parse_all(self._name, self._path)

    def _problem(self, line: bytes, number: int, i: int) -> InputError:
        return InputError(f"{self._name}: record {i + 1} is not usable JSON")


class _Rows(Reader):
    """Read records that are rows of a parquet file, in batches."""

    def __init__(self, name: str, path: Path, columns: set[str], span: range | None = None):
        self._name, self._path, self._columns = name, path, columns
        if span is None:
            with self._file() as file:
                span = range(file.metadata.num_rows)
        self._span = span

    def __len__(self) -> int:
        return len(self._span)

    def cut(self, part: slice) -> "_Rows":
        assert part.step in (None, 1)
        return _Rows(self._name, self._path, self._columns, self._span[part])

    def scan(self) -> Iterator[Any]:
        with self._file() as file:
            starts = [0]
            for group in range(file.num_row_groups):
                starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
            first = max(0, bisect_right(starts, self._span.start) - 1)
            at, groups = starts[first], range(first, file.num_row_groups)
            columns = [name for name in file.schema_arrow.names if name in self._columns] or None
            growth = _Growth(self._name, self._path)
            for batch in file.iter_batches(self._rows(file.metadata), groups, columns):
                if at >= self._span.stop:
                    return
                batch = _decoded(batch)
                growth.add(batch.nbytes)
                yield from map(present, batch[max(0, self._span.start - at) : self._span.stop - at].to_pylist())
                at += batch.num_rows

    def _rows(self, metadata: Any) -> int:
        """Return the rows to hold at a time: fewer where a dictionary's value may be long, as each row repeats it.

        Raises InputError for columns that expand a thousandfold.
        """
        size, most = self._path.stat().st_size, _ROWS
        if metadata.num_rows > _FEW + 4 * size:
            raise InputError(
                f"{self._name}: its {size:,} bytes say that they hold {metadata.num_rows:,} rows: not the data of a "
                "training; write the records anew, each once"
            )
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                _Growth(self._name, self._path).add(column.total_uncompressed_size)
                starts = [column.data_page_offset, column.dictionary_page_offset]
                longest = _dictionary_size(self._path, min(start for start in starts if start is not None))
                most = min(most, _AT_ONCE // max(1, longest))
        return max(1, most)

    @contextmanager
    def _file(self) -> Iterator[Any]:
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(self._path) as file:
                yield file
        except (OSError, pyarrow.ArrowException, ValueError) as e:  # a text that is not UTF-8 is a ValueError
            raise InputError(f"{self._name}: cannot be read as a parquet file ({one_line(e)})") from None


def _dictionary_size(path: Path, start: int) -> int:
    """Return the bytes of the dictionary page of a parquet column that begins at `start`; 0 where the page is another.

    A page begins with its type and its size, i32 of Thrift's compact protocol: 0x15 and a zigzag number. A header that
    is written otherwise counts as LONGEST.
    """
    with path.open("rb") as file:
        file.seek(max(0, start))
        numbers, header = [], file.read(16)
    for _ in range(2):
        if header[:1] != b"\x15":
            return LONGEST
        end = next((at for at, byte in enumerate(header[1:], start=2) if byte < 0x80), len(header))
        numbers.append(sum((byte & 0x7F) << 7 * i for i, byte in enumerate(header[1:end])) >> 1)
        header = header[end:]
    kind, size = numbers
    return size if kind == _DICTIONARY_PAGE else 0


def _decoded(batch: Any) -> Any:
    """Return a batch of Arrow with its dictionaries' values in their places, where they count as bytes."""
    import pyarrow

    columns = [c.dictionary_decode() if pyarrow.types.is_dictionary(c.type) else c for c in batch.columns]
    return pyarrow.RecordBatch.from_arrays(columns, batch.schema.names)


class Table(Reader):
    """Read records that are rows of a table of `datasets`, in batches."""

    def __init__(self, name: str, table: Any, columns: set[str], span: range | None = None):
        known = [column for column in table.column_names if column in columns]
        self._name, self._table, self._columns = name, table.select_columns(known) if known else table, columns
        self._span = range(len(table)) if span is None else span

    def __len__(self) -> int:
        return len(self._span)

    def cut(self, part: slice) -> "Table":
        return Table(self._name, self._table, self._columns, self._span[part])

    def scan(self) -> Iterator[Any]:
        for start in range(self._span.start, self._span.stop, _ROWS):
            columns = self._table[start : min(start + _ROWS, self._span.stop)]
            for row in zip(*columns.values(), strict=True):
                yield present(dict(zip(columns, row, strict=True)))


class Kept(Reader):
    """Read the records at some places of another reader, ascending."""

    def __init__(self, reader: Reader, places: "array[int]"):
        self._reader, self.places = reader, places

    def __len__(self) -> int:
        return len(self.places)

    def cut(self, part: slice) -> "Kept":
        return Kept(self._reader, self.places[part])

    def where(self, i: int) -> tuple[str, int]:
        return self._reader.where(self.places[i])

    def scan(self) -> Iterator[Any]:
        if not self.places:
            return
        first, wanted = self.places[0], iter(self.places)
        place = next(wanted)
        for at, record in enumerate(self._reader[first : self.places[-1] + 1].scan(), first):
            if at == place:
                yield record
                place = next(wanted, -1)


class Joined(Reader):
    """Read the records of several readers end to end."""

    def __init__(self, readers: Sequence[Reader]):
        self.readers = readers
        self._ends = [0, *accumulate(map(len, readers))]

    def __len__(self) -> int:
        return self._ends[-1]

    def cut(self, part: slice) -> "Joined":
        span = range(len(self))[part]
        cuts = [slice(max(0, span.start - end), max(0, span.stop - end)) for end in self._ends[:-1]]
        return Joined([reader.cut(part) for reader, part in zip(self.readers, cuts, strict=True)])

    def where(self, i: int) -> tuple[str, int]:
        part = bisect_right(self._ends, i) - 1
        return self.readers[part].where(i - self._ends[part])

    def scan(self) -> Iterator[Any]:
        return chain.from_iterable(reader.scan() for reader in self.readers)


class _Growth:
    """Count the bytes that the rows of a file expand to, and refuse a file that expands a thousandfold."""

    def __init__(self, name: str, path: Path):
        self._name, self._size, self._bytes = name, path.stat().st_size, 0

    def add(self, count: int) -> None:
        """Count bytes. Raises InputError."""
        self._bytes += count
        if self._bytes > EXPANDED + GROWTH * self._size:
            raise InputError(
                f"{self._name}: its {self._size:,} bytes expand to over {self._bytes:,}: not the data of a training; "
                "write the records anew, each once"
            )


def open_file(name: str, path: Path, columns: set[str]) -> Reader:
    """Return the records of a file by its suffix and first bytes; of tables, only these columns. Raises InputError."""
    if path.suffix in COMPRESSED:
        path = _decompressed(name, path)
    suffix = suffix_of(path)
    with path.open("rb") as file:
        bom = file.read(3) == _BOM
        file.seek(3 * bom)
        while (start := file.read(1024)) and not start.strip():
            pass
        if not start:
            raise InputError(f"{name}: the file is empty")
        if start.startswith(b"version https://git-lfs"):
            raise InputError(f"{name}: is a pointer of Git LFS, without the data; run git lfs pull in its folder")
        if suffix == ".arrow" or (suffix != ".txt" and start.startswith((b"ARROW1", b"\xff\xff\xff\xff"))):
            return Table(name, _arrow(name, path), columns)
        if suffix in (".csv", ".tsv"):
            return Table(name, _csv(name, path, "," if suffix == ".csv" else "\t"), columns)
        if suffix != ".txt" and start.startswith(b"PAR1"):
            return _Rows(name, path, columns)
        if suffix != ".txt" and start.lstrip().startswith(b"["):
            return _elements(name, path)
        at = 3 * bom
        file.seek(at)
        starts, sizes = array("q"), array("q")
        while line := file.readline(LONGEST + 1):
            if len(line) > LONGEST:
                raise InputError(f"{name}: the line at byte {at:,} has over {LONGEST:,} bytes; divide the record")
            if line.strip():
                starts.append(at)
                sizes.append(len(line))
            at += len(line)
    return Lines(name, path, _parse_text if suffix == ".txt" else _parse_line, starts, sizes)


def _decompressed(name: str, path: Path) -> Path:
    """Return a temporary copy of a compressed file. Raises InputError."""
    import fsspec

    try:
        with fsspec.open(str(path), "rb", compression={".zst": "zstd"}.get(path.suffix, "infer")) as file:
            return copy_in(file, path.stem, EXPANDED + GROWTH * path.stat().st_size)
    except InputError as e:
        raise InputError(f"{name}: {e}") from None
    except Exception as e:  # each format has its own classes
        raise InputError(f"{name}: cannot be decompressed: {one_line(e)}") from None


def _arrow(name: str, path: Path) -> Any:
    """Open an Arrow file, of the stream format as save_to_disk writes it, or of the file format, as Feather."""
    import pyarrow
    from pyarrow import compute

    try:
        source = pyarrow.memory_map(str(path))
        try:
            table = pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            table = pyarrow.ipc.open_file(source).read_all()
        table.validate(full=True)  # else a wrong offset would read other memory
        growth = _Growth(name, path)
        for chunk in (chunk for column in table.columns for chunk in column.chunks):
            if pyarrow.types.is_dictionary(chunk.type) and pyarrow.types.is_string(chunk.type.value_type):
                lengths = compute.binary_length(chunk.dictionary)
                growth.add(compute.sum(lengths.take(chunk.indices)).as_py() or 0)
        return import_datasets().Dataset(import_datasets().table.InMemoryTable(table))
    except (OSError, pyarrow.ArrowException, NotImplementedError) as e:
        raise InputError(f"{name}: cannot be read as an Arrow file ({one_line(e)})") from None


def _csv(name: str, path: Path, separator: str) -> Any:
    """Read a file of comma-separated values whose first line names the columns; all values are strings."""
    import csv

    datasets = import_datasets()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file, delimiter=separator))
        return datasets.Dataset.from_csv(
            str(path),
            features=datasets.Features({column: datasets.Value("string") for column in header}),
            cache_dir=_temporary().name,
            sep=separator,
            keep_default_na=False,
            encoding="utf-8-sig",
        )
    except Exception as e:  # pandas' and those of `datasets`
        raise InputError(f"{name}: cannot be read as CSV ({one_line(e)})") from None


def _elements(name: str, path: Path) -> Reader:
    """Find the elements of a JSON array by its commas; each is parsed, and so checked, on access.

    Raises InputError where the file is no array.
    """
    starts, sizes, start, depth, at = array("q"), array("q"), 0, 0, 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while mark := _MARK.match(data, at, min(at + LONGEST, len(data))):
            at = mark.end()
            if at - start > LONGEST:
                raise InputError(f"{name}: record {len(starts) + 1} has over {LONGEST:,} bytes; divide it")
            kind = data[at - 1 : at]
            if depth == 1 and kind in b",]":
                starts.append(start)
                sizes.append(at - 1 - start)
            depth += (kind in b"[{") - (kind in b"]}")
            if depth == 1 and kind in b"[,":
                start = at
            if depth == 0:
                break
        around = b"" if depth or kind != b"]" else data[: starts[0] - 1].removeprefix(_BOM) + data[at:]
        if depth or kind != b"]" or around.strip(_BLANK):
            _parse_all(name, path)  # raises an error with line and column
            raise AssertionError("JSON, but no array")
        if len(starts) == 1 and not data[starts[0] : at - 1].strip(_BLANK):
            starts, sizes = array("q"), array("q")
    return Elements(name, path, _parse_line, starts, sizes)


def _parse_all(name: str, path: Path) -> Any:
    """Parse a file whole, for its error's line and column. Raises InputError, for large files without the place."""
    if (size := path.stat().st_size) > LONGEST:
        raise InputError(f"{name}: not valid JSON; in {size:,} bytes the place is not searched: write an object a line")
    return parse_json(path.read_bytes().removeprefix(_BOM), name)


def _keys_of_one(path: Path) -> list[str] | None:
    """Return the keys of a file that is one JSON object; None for other files."""
    try:
        value = _parse_all("", path)
    except InputError:
        return None
    return [*value] if isinstance(value, dict) else None


def _parse_line(line: bytes, where: str, number: int) -> Any:
    return parse_json(line.rstrip(b"\r\n"), where, number)


def _parse_text(line: bytes, where: str, number: int) -> Record:
    try:
        return {"text": line.rstrip(b"\r\n").decode("utf-8-sig")}
    except UnicodeDecodeError as e:
        raise InputError(f"{where}: not UTF-8 at line {number}: {e.reason}") from None


def present(value: Any) -> Any:
    """Return JSON or a row without its nulls: a key whose value is null is absent, as tables have all keys."""
    if isinstance(value, dict):
        return {key: present(v) for key, v in value.items() if v is not None}
    if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        return [present(v) for v in value]
    return value


def import_datasets() -> Any:
    """Import `datasets`: here, because it takes 2 s."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()  # its bars; those of downloads are huggingface_hub's
    return datasets


def one_line(e: Exception) -> str:
    """Return an exception's text in one line, or the name of its class."""
    return " ".join(str(e.__cause__ or e).split())[:200] or type(e).__name__


def suffix_of(path: Path) -> str:
    """Return the suffix of a file's kind, before that of its compression."""
    return (Path(path.stem) if path.suffix in COMPRESSED else path).suffix.lower()


@cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="llama_jax-data-")  # until the process ends


def copy_in(file: Any, name: str, limit: float = math.inf) -> Path:
    """Copy an open file into a temporary folder and return its path. Raises InputError for over `limit` bytes."""
    target, copied = Path(tempfile.mkdtemp(dir=_temporary().name)) / name, 0
    with target.open("wb") as copy:
        while part := file.read(1 << 20):
            copied += copy.write(part)
            if copied > limit:
                target.unlink()
                raise InputError(f"expands to over {limit:,} bytes: not the data of a training; unpack it yourself")
    return target
