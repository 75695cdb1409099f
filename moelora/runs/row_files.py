"""Rows from files: JSON, JSONL, CSV, TSV and Parquet, with errors that name the file and the line."""

from __future__ import annotations

import csv
import glob
from pathlib import Path
from typing import Any

from moelora.errors import RunError
from moelora.runs.wording import one_line

# Suffixes of the files that `datasets` reads, and its name for them.
_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
SUFFIXES = tuple(_BUILDERS)
"""Those of the files that rows are read from."""


def matching(files: str | list[str] | None) -> list[str]:
    """The files that patterns match; none where none are given.

    Args:
        files: A pattern, or several.

    Raises:
        RunError: If one matches none, a file is empty, or they are not of one kind.
    """
    patterns = [files] if isinstance(files, str) else list(files or [])
    paths: list[str] = []
    for pattern in patterns:
        found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))  # noqa: PTH207 - absolute ones too
        if not found:
            raise RunError(f"dataset.files: no file matches {pattern!r} (from {Path.cwd()}).")
        paths += found
    empty = [path for path in paths if Path(path).is_file() and Path(path).stat().st_size == 0]
    if empty:
        raise RunError(f"dataset.files: {', '.join(empty)} is empty; needed: rows.")
    suffixes = sorted({Path(path).suffix for path in paths})
    builders = {_BUILDERS.get(suffix) for suffix in suffixes}
    if paths and (None in builders or len(builders) != 1):
        raise RunError(f"dataset.files are of kind {', '.join(suffixes)}; allowed: one kind of {', '.join(_BUILDERS)}.")
    return paths


def read(paths: list[str]) -> Any:
    """The rows of files of one kind, one after the other.

    Args:
        paths: The files.

    Raises:
        RunError: If one is not readable.
    """
    from datasets import load_dataset

    suffix = Path(paths[0]).suffix
    words: dict[str, Any] = {}
    if _BUILDERS[suffix] == "csv":
        delimiter = "\t" if suffix == ".tsv" else ","
        headers = [_check_table(path, delimiter) for path in paths]
        words = {"delimiter": delimiter, **_csv_words(headers[0])}
    elif _BUILDERS[suffix] == "json":
        for path in paths:
            _check_utf8(path)
    try:
        return load_dataset(_BUILDERS[suffix], data_files=paths, split="train", **words)
    except Exception as error:  # pandas, pyarrow, gzip, json and datasets each raise their own
        reason = one_line(error.__cause__ or error)[:300]
        if "corresponds to no data" in reason:
            raise RunError(f"dataset.files {', '.join(paths)}: no rows.") from error
        raise RunError(f"dataset.files {', '.join(paths)}: not readable as {suffix}: {reason}") from error


def _csv_words(header: list[str]) -> dict[str, Any]:
    """How a table is read: cells as they are written, so that "007" and "NA" stay texts; a blank cell is missing."""
    from datasets import Features, Value

    features = Features({name: Value("string") for name in header})
    return {"features": features, "keep_default_na": False, "na_values": [""]}


def _check_table(path: str, delimiter: str) -> list[str]:
    """The header of a table, no row of which has more cells than that: pandas would take the first ones for an index.

    Raises:
        RunError: Names the line.
    """
    longest = csv.field_size_limit(2**31 - 1)
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter)
            header = next(reader, [])
            for row in reader:
                if len(row) > len(header):
                    raise RunError(
                        f"line {reader.line_num} of {path} has {len(row)} cells, and the header "
                        f"{len(header)}; allowed: as many. Put cells that hold the separator into quotes."
                    )
    except (csv.Error, UnicodeDecodeError) as error:
        raise RunError(f"line {reader.line_num + 1} of {path} is not readable: {one_line(error)}") from error
    finally:
        csv.field_size_limit(longest)
    if len(set(header)) < max(1, len(header)):
        raise RunError(f"the header of {path} is {header}; needed: a name for each column, no two alike.")
    return header


def _check_utf8(path: str) -> None:
    """Refuse text in another encoding, which pyarrow reads and nobody can use.

    Raises:
        RunError: Names the line.
    """
    with Path(path).open("rb") as file:
        if file.read(2) == b"\x1f\x8b":  # gzip, which `datasets` unpacks
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise RunError(f"line {number} of {path} is not UTF-8: {one_line(error)} Convert the file.") from error
