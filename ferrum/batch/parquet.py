"""Parquet files: rows of one, and the output as one (extra `parquet`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import IO, TYPE_CHECKING, Any

from ferrum.batch.encoding import from_json, to_json
from ferrum.errors import BatchError, OptionError

if TYPE_CHECKING:
    import pyarrow

_BATCH = 4096  # rows in memory at once


def require() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise OptionError('.parquet files need the package pyarrow: pip install "ferrum-engine[parquet]"') from None
    return pyarrow


def rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a file; what is null is left out, for in JSON it would not be there."""
    arrow = require()
    try:
        with arrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                for row in batch.to_pylist():
                    yield {name: value for name, value in row.items() if value is not None}
    except (arrow.ArrowException, OSError) as error:
        raise BatchError(f"{path} cannot be read: {str(error).splitlines()[0].rstrip('.')}. It is damaged, or no Parquet file.") from error


def write(file: IO[bytes], lines: Iterable[bytes]) -> None:
    """Rows of JSON as a table, in two readings: one for the types of its columns, one for its values.

    Where rows disagree on the type of a column it holds JSON as text.
    """
    arrow = require()
    schema, as_text = _schema(arrow, lines)
    with arrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in _batches(lines):
            for row in batch:
                for name in as_text:
                    if name in row:
                        row[name] = to_json(row[name]).decode()
            writer.write_table(arrow.Table.from_pylist(batch, schema=schema))


def _schema(arrow: Any, lines: Iterable[bytes]) -> tuple[pyarrow.Schema, list[str]]:
    """The types of all columns, in order of their first appearance, and those that hold JSON as text."""
    types: dict[str, Any] = {}
    as_text: set[str] = set()
    for batch in _batches(lines):
        for name in dict.fromkeys(name for row in batch for name in row):
            if name in as_text:
                continue
            try:
                found = arrow.array([row.get(name) for row in batch]).type  # infer_type takes [1, "a"] for numbers
                known = types.get(name, found)
                merged = arrow.unify_schemas([arrow.schema([(name, known)]), arrow.schema([(name, found)])], promote_options="permissive")
                types[name] = merged.field(name).type
            except (arrow.ArrowException, OverflowError):
                types[name] = arrow.string()
                as_text.add(name)
    for name, type in types.items():
        if _is_empty(arrow, type):
            types[name] = arrow.string()
            as_text.add(name)
    return arrow.schema(list(types.items())), sorted(as_text)


def _is_empty(arrow: Any, type: Any) -> bool:
    """Whether a type has objects without fields, which Parquet cannot hold."""
    if arrow.types.is_struct(type):
        return type.num_fields == 0 or any(_is_empty(arrow, type.field(i).type) for i in range(type.num_fields))
    return arrow.types.is_list(type) and _is_empty(arrow, type.value_type)


def _batches(lines: Iterable[bytes]) -> Iterator[list[dict[str, Any]]]:
    source = iter(lines)
    while batch := [from_json(line) for line in islice(source, _BATCH)]:
        yield batch
