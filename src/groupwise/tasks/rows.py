"""Rows of a dataset, each a mapping of columns, in whatever form it comes.

JSON, JSON lines and CSV are read here, so that a message can name the line, and no column's type is guessed; Parquet, directories
and hub ids are read by the library `datasets`. One row becomes Python objects when it is asked for.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from groupwise.errors import UserError, nearest

Row = dict[str, Any]
MAX_DEPTH = 64
"""How deep lists and objects may be nested in a row; what copies and writes rows does so recursively."""


class Rows(Protocol):
    """Rows by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...

    def place(self, index: int) -> str:
        """Where a row was written, for messages: the file and the line."""
        ...


Stream = Callable[[], Iterator[tuple[str, Row]]]
"""Reads rows from the first one on, each with its place."""


@dataclass(frozen=True)
class JsonRows:
    """A file of JSON, kept as bytes; a row is parsed when it is asked for."""

    name: str
    texts: Sequence[bytes]
    places: Sequence[int]
    """The number of each row's line, or of the row in its list."""
    unit: str = "line"

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Row:
        return parse_row(self.texts[index], self.place(index))

    def place(self, index: int) -> str:
        return f"{self.name}, {self.unit} {self.places[index]}"


@dataclass(frozen=True)
class TableRows:
    """A table that gives a row for an index: a `datasets.Dataset`, memory-mapped from Arrow files, or a list of rows."""

    name: str
    table: Any

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Row:
        try:
            row = self.table[index]
        except Exception as error:  # a value that Python has no form of, such as a date of another calendar
            raise UserError(f"{self.place(index)}: cannot be read: {str(error)[:200]}") from error
        return plain_row(row, self.place(index))

    def place(self, index: int) -> str:
        return f"{self.name}, row {index + 1}"


def parse_row(text: bytes, place: str) -> Row:
    """The object that one line of JSON spells.

    Raises:
        UserError: it is not JSON, no object, nested too deep, or holds text that is not Unicode.
    """
    columns = parse_json(text, place)
    if not isinstance(columns, dict):
        raise UserError(f"{place}: expected an object with the row's columns, not {type(columns).__name__}")
    return columns


def parse_json(text: bytes, place: str) -> Any:
    """The value that JSON of one or more lines spells.

    Raises:
        UserError: it is not JSON, nested too deep, or holds text that is not Unicode.
    """
    try:
        value = json.loads(text.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if b"\n" in text.rstrip() else ""
        raise UserError(f"{place}{line}: not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise UserError(f"{place}: lists and objects are nested more than {MAX_DEPTH} levels deep") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{place}: {str(error).split(';')[0].replace('Exceeds', 'a number exceeds')}") from error
    if b"\\u" in text or text.count(b"[") + text.count(b"{") > MAX_DEPTH:
        check_plain(value, place)
    return value


def check_plain(value: Any, place: str, depth: int = 0) -> None:
    """Refuse what could not be written down again: text that is not Unicode, and deep nesting."""
    if depth > MAX_DEPTH:
        raise UserError(f"{place}: lists and objects are nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{place}: a text is not Unicode: half of a surrogate pair, {value[error.start]!r}") from error
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        check_plain(item, place, depth + 1)
    if isinstance(value, dict):
        check_plain(list(value), place, depth)


def plain_row(row: Any, place: str) -> Row:
    """A row as JSON has it: dates as ISO text, keys that are None in a message left out.

    Raises:
        UserError: a column holds bytes, a picture or the like.
    """
    return {str(key): _plain(value, f"{place}: {key!r}") for key, value in row.items()}


def _plain(value: Any, place: str) -> Any:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, dict):  # Arrow gives every object of a list the keys of all of them
        return {key: _plain(item, place) for key, item in value.items() if item is not None or "role" not in value}
    if isinstance(value, list | tuple):
        return [_plain(item, place) for item in value]
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise UserError(f"{place} holds {type(value).__name__}; a column must hold text, numbers, lists or objects")


def json_lines(path: Path) -> JsonRows:
    """The lines of a .jsonl file that are not empty."""
    lines = _without_mark(path.read_bytes()).split(b"\n")
    kept = [i for i, line in enumerate(lines) if line.strip()]
    return JsonRows(str(path), [lines[i] for i in kept], [i + 1 for i in kept])


def _without_mark(data: bytes) -> bytes:
    return data.removeprefix(b"\xef\xbb\xbf")  # the byte-order mark that some editors write


def json_file(path: Path) -> JsonRows:
    """A .json file: a list of objects, or one object a line."""
    data = _without_mark(path.read_bytes())
    if not data.lstrip().startswith(b"["):
        return json_lines(path)
    items = parse_json(data, str(path))
    return JsonRows(str(path), [json.dumps(item).encode() for item in items], range(1, len(items) + 1), "row")


def csv_rows(path: Path) -> Iterator[Row]:
    """The rows of a .csv or .tsv file with a header; every column stays text, as it is written.

    Raises:
        UserError: naming the line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            header = next(reader, [])
            if len(set(header)) != len(header) or not all(header):
                raise UserError(f"{path}, line 1: the header must name each column once, not {str(header)[:200]}")
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise UserError(f"{path}, line {reader.line_num}: {len(cells)} cells for {len(header)} columns")
                if cells:
                    yield dict(zip(header, cells, strict=True))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {_line_not_utf8(path)}: not UTF-8: {error.reason}") from error
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _line_not_utf8(path: Path) -> int:
    """The first line that is not UTF-8; the decoder of a file knows only a place in its buffer."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line != line.decode(errors="ignore").encode():
                return number
    return 1


def csv_table(path: Path) -> TableRows:
    import pyarrow as pa

    rows = list(csv_rows(path))
    return TableRows(str(path), _ArrowTable(pa.Table.from_pylist(rows)))


@dataclass(frozen=True)
class _ArrowTable:
    """Rows of an Arrow table by index."""

    table: Any

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: int) -> Row:
        (row,) = self.table.slice(index, 1).to_pylist()
        return dict(row)


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_file,
    ".csv": csv_table,
    ".tsv": csv_table,
}
"""What reads a file, by its suffix; the library `datasets` reads .parquet, directories and hub ids."""
SUFFIXES = (*READERS, ".parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where rows come from."""

    path: str
    """A file's or directory's absolute path, or a hub id."""
    config: str = ""
    split: str = "train"

    @property
    def file(self) -> Path | None:
        return Path(self.path) if Path(self.path).is_file() else None

    @classmethod
    def find(cls, name: str, base: Path, config: str, split: str) -> "Origin":
        """The origin that a recipe names: a file or directory beside the recipe or here, or a hub id.

        Raises:
            UserError: there is no such file, and the name is no hub id, or a setting has no meaning for it.
        """
        try:
            path = next((path for path in (base / name, Path(name)) if name and path.exists()), None)
        except (OSError, ValueError):  # a name too long for a file, or with a null character
            path = None
        if path is None:
            if Path(name).suffix in SUFFIXES or name.count("/") > 1 or name.startswith((".", "~", "/")) or not name:
                beside = [item.name for item in base.glob("*") if item.suffix in SUFFIXES]
                raise UserError(f"there is no file {name!r} beside the recipe or here{nearest(name, beside)}")
            return cls(path=name, config=config, split=split or "train")
        if path.is_file() and path.suffix not in SUFFIXES:
            raise UserError(f"{name!r} is not a {', '.join(SUFFIXES)} file{nearest(path.suffix, SUFFIXES)}")
        if path.is_file() and (config or split not in ("", "train")):
            raise UserError(f"{name!r} is one file, which has no {'configurations' if config else f'split {split!r}'}")
        return cls(path=str(path.resolve()), config=config, split=split or "train")

    def rows(self) -> Rows:
        """The rows, by index.

        Raises:
            UserError: they cannot be read.
        """
        if self.file is not None and self.file.suffix in READERS:
            return READERS[self.file.suffix](self.file)
        return TableRows(self.path, self._load(streaming=False))

    def stream(self) -> Stream:
        """The rows from the first one on, read as they are needed.

        Raises:
            UserError: they cannot be read.
        """
        file = self.file
        if file is not None and file.suffix in (".jsonl", ".ndjson"):
            return lambda: _stream_lines(file)
        if file is not None and file.suffix in (".csv", ".tsv"):
            return lambda: _placed(self.path, csv_rows(file))
        if file is not None and file.suffix == ".json":
            raise UserError(f"{self.path}: a .json file is read whole; streaming takes .jsonl, .csv, .parquet or a hub id")
        dataset = self._load(streaming=True)
        return lambda: _placed(self.path, _explained(self.path, iter(dataset)))

    def _load(self, streaming: bool) -> Any:
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are logged with a traceback, and raised too
        path = Path(self.path)
        try:
            if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
                return self._saved(datasets.load_from_disk(self.path), streaming)
            if path.is_file():
                return datasets.load_dataset("parquet", data_files=self.path, split="train", streaming=streaming)
            return datasets.load_dataset(self.path, name=self.config or None, split=self.split, streaming=streaming)
        except UserError:
            raise
        except Exception as error:  # the hub, the network, the cache or the files may fail in any way
            raise UserError(_trouble(self, error)) from error

    def _saved(self, saved: Any, streaming: bool) -> Any:
        """What `save_to_disk` wrote: one dataset, or one for each split."""
        if isinstance(saved, dict):
            if self.split not in saved:
                raise UserError(f"{self.path}: there is no split {self.split!r}{nearest(self.split, saved)}")
            saved = saved[self.split]
        return saved.to_iterable_dataset() if streaming else saved


def _trouble(origin: Origin, error: Exception) -> str:
    """What went wrong, in one line, and what can be done."""
    name = origin.path + (f" ({origin.config})" if origin.config else "")
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    if Path(origin.path).exists():
        cause = error.__cause__ or error.__context__
        inner = f": {str(cause).strip().splitlines()[0][:300]}" if cause is not None and str(cause).strip() else ""
        return f"{name} cannot be read: {first}{inner}"
    return f"there is no file or directory {origin.path!r} beside the recipe or here, and from the hub it cannot be had: {first}"


def _placed(name: str, rows: Iterator[Any]) -> Iterator[tuple[str, Row]]:
    for i, row in enumerate(rows):
        place = f"{name}, row {i + 1}"
        yield place, plain_row(row, place)


def _explained(name: str, rows: Iterator[Any]) -> Iterator[Any]:
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # the network or the files may fail in any way
            first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise UserError(f"{name}: reading the stream fails: {first}") from error
        yield row


def _stream_lines(path: Path) -> Iterator[tuple[str, Row]]:
    with io.BufferedReader(io.FileIO(path)) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = _without_mark(line)
            if line.strip():
                place = f"{path}, line {number}"
                yield place, parse_row(line, place)
