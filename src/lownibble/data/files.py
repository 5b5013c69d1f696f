"""File readers: JSON Lines, CSV and Parquet.

Text files are read as bytes and decoded here, so that an invalid byte is reported with its line. Blank lines are skipped and a
byte order mark is dropped. JSON Lines and CSV may be compressed (.gz, .bz2). CSV cells stay text, empty ones included: whether
an empty cell matters is decided where the fields are used (`forms`). CSV is parsed strictly, with the first line as header,
instead of with pandas' guesses (types, NaN words such as "NA", separators).
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from lownibble.data.rows import Problems, Row
from lownibble.errors import DataError

_COMPRESSION: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".bz2": bz2.decompress}


def read_file(path: Path) -> list[Row]:
    """Read all rows of a data file; the suffix (`SUFFIXES`) selects the reader.

    Raises:
        DataError: unknown suffix, unreadable or damaged file, bad rows (with their lines), or no rows.
    """
    for suffix, reader in _READERS.items():
        if path.name.lower().endswith(suffix):
            rows = reader(path)
            break
    else:
        raise DataError(f"Cannot tell the format of '{path}'. Give it one of the suffixes {', '.join(SUFFIXES)}.")
    if not rows:
        raise DataError(f"'{path}' holds no rows. Check that it is the right file and was written to the end.")
    return rows


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        decompress = _COMPRESSION.get(path.suffix.lower())
        return decompress(content) if decompress else content
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"Cannot read '{path}': {error}. Check the path, or copy the file again if it is damaged.") from error


def _without_mark(content: bytes) -> bytes:
    return content.removeprefix(b"\xef\xbb\xbf")


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} is not valid UTF-8. Save the file as UTF-8."


def _read_jsonl(path: Path) -> list[Row]:
    rows, problems = [], Problems(str(path))
    content = _without_mark(_read_bytes(path))
    if content.lstrip().startswith(b"["):
        return _array(path, content)
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        origin = f"{path.name}:{number}"
        try:
            value = json.loads(line.decode("utf-8"), parse_constant=_reject_constant)
        except UnicodeDecodeError as error:
            problems.add(origin, _not_utf8(error))
        except json.JSONDecodeError as error:
            hint = "Mend or remove that line; each line must hold one whole JSON object."
            problems.add(origin, f"invalid JSON: {error.msg} at column {error.colno}. {hint}")
        except ValueError as error:
            problems.add(origin, str(error))
        except RecursionError:
            problems.add(origin, "JSON nested too deeply. Remove that line.")
        else:
            if isinstance(value, dict):
                rows.append(Row(value, origin))
            else:
                kind = {list: "an array", str: "text", type(None): "null"}.get(type(value), "a bare value")
                problems.add(origin, f"the line holds {kind}, not a JSON object. Write one {{...}} object a line.")
    problems.check()
    return rows


def _array(path: Path, content: bytes) -> list[Row]:
    """The rows of a file that is one JSON array."""
    try:
        values = json.loads(content.decode("utf-8"), parse_constant=_reject_constant)
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: {_not_utf8(error)}") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path.name}:{error.lineno}: invalid JSON: {error.msg} at column {error.colno}. Mend the file."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name}: {error}") from None
    problems = Problems(str(path))
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            problems.add(f"{path.name}[{number}]", "it is no JSON object. Write an array of objects.")
    problems.check()
    return [Row(value, f"{path.name}[{number}]") for number, value in enumerate(values, 1)]


def _reject_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a usable value. Replace it, or remove the row.")


def _read_csv(path: Path) -> list[Row]:
    content = _without_mark(_read_bytes(path))
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path.name}:{line}: {_not_utf8(error)}") from None
    limit = csv.field_size_limit(sys.maxsize)
    try:
        return _csv_rows(path, text)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(path: Path, text: str) -> list[Row]:
    rows, problems = [], Problems(str(path))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            origin = f"{path.name}:{line}"
            line = reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = cells
                if "" in header or len(set(header)) < len(header):
                    raise DataError(f"{origin}: the header has empty or repeated names: {header}. Name every column once.")
            elif len(cells) != len(header):
                hint = "Quote cells that hold a comma, a quote or a line break."
                problems.add(origin, f"{len(cells)} cells where the header has {len(header)}. {hint}")
            else:
                rows.append(Row(dict(zip(header, cells, strict=True)), origin))
    except csv.Error as error:
        problems.add(f"{path.name}:{line}", f"invalid CSV from here on: {error}. Check the quotes around this row.")
    problems.check()
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"Cannot read '{path}' as Parquet: {error}. Copy the file again if it is damaged.") from error
    names = table.column_names
    if len(set(names)) < len(names):
        raise DataError(f"'{path}' has columns of one name: {names}. Name every column once.")
    columns = [_values(path, name, table.column(name)) for name in names]
    rows = zip(*columns, strict=True) if columns else iter([()] * table.num_rows)
    return [Row(dict(zip(names, values, strict=True)), f"{path.name}:{number}") for number, values in enumerate(rows, 1)]


def _values(path: Path, name: str, column: Any) -> list[Any]:
    """A Parquet column's values; bytes that are text (as older writers leave it) as text."""
    import pyarrow as pa

    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        with contextlib.suppress(pa.ArrowInvalid):  # no text: `forms.py` refuses it where it is used
            column = column.cast(pa.large_string())
    try:
        found: list[Any] = column.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"The column '{name}' of '{path}' cannot be read: {reason}. Mend it, or leave it out.") from error
    return found


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    **{base + packed: _read_jsonl for base in (".jsonl", ".ndjson", ".json") for packed in ("", ".gz", ".bz2")},
    **{".csv" + packed: _read_csv for packed in ("", ".gz", ".bz2")},
    ".parquet": _read_parquet,
}

SUFFIXES = tuple(_READERS)
"""Supported file-name suffixes. `.json` is read as JSON Lines; either may hold one array instead."""
