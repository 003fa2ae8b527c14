"""Rows of a Parquet file, a few at a time. The reading is pyarrow's, which is optional."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from dlora.protocol.command import missing_extra
from dlora.protocol.errors import DataError
from dlora.protocol.text import first_line

from .lines import MAX_RECORD_BYTES, file_errors

_ROWS_AT_ONCE: Final = 256


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of a row, from 1, and its values by column. Raises ``DataError``, or ``MissingExtraError``."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_extra(error, "parquet") from None
    pyarrow.set_cpu_count(1)
    with file_errors(path), path.open("rb") as source:
        number = 0
        try:
            file = parquet.ParquetFile(source)
            largest = max(
                (file.metadata.row_group(index).total_byte_size for index in range(file.num_row_groups)), default=0
            )
            rows = 1 if largest > MAX_RECORD_BYTES * _ROWS_AT_ONCE else _ROWS_AT_ONCE
            for batch in file.iter_batches(batch_size=rows, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _without_nulls(row)
        except (pyarrow.ArrowException, ValueError, TypeError) as error:
            raise DataError(f"{path}:{number + 1}: not valid Parquet ({first_line(error)})") from None


def _without_nulls(value: Any) -> Any:
    """``value`` without the keys that Parquet gives to every object of a list because one of them has a value there."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value
