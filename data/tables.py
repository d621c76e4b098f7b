"""Rows of a user's own file: .csv with a header, or .jsonl with one JSON object a line."""

import csv
import io
import json
from pathlib import Path

from errors import InputError


def read_text(file: Path) -> str:
    """The content of a UTF-8 file, without the mark that spreadsheets put first. Raises InputError for others."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text") from None


def read_rows(file: Path) -> list[tuple[str, dict]]:
    """The rows of a .csv or .jsonl file, each after its place ("edits.csv, line 3") for messages about it. Raises
    InputError with the place where a row is broken, not Unicode, or has two values of one name."""
    rows, text, line = [], read_text(file), 1
    if file.suffix.lower() not in (".csv", ".jsonl"):
        raise InputError(f"{file}: the list must be a .csv or a .jsonl file")
    try:
        if file.suffix.lower() == ".csv":
            reader = csv.DictReader(io.StringIO(text, newline=""), restkey="a cell without a header", strict=True)
            unique([(name, None) for name in reader.fieldnames or ()])
            line = reader.line_num + 1
            for row in reader:
                rows.append((f"{file}, line {reader.line_num}", row))
                line = reader.line_num + 1  # where the next begins: a quote that is never closed reaches the end
        else:
            for line, row in enumerate(text.split("\n"), start=1):  # not splitlines: its other ends may be in a text
                if row.strip():
                    row = {**json.loads(row, object_pairs_hook=unique)}
                    json.dumps(row, ensure_ascii=False).encode()
                    rows.append((f"{file}, line {line}", row))
    except (csv.Error, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{file}, line {line} is not a row of a list: {error}") from None
    return rows


def unique(pairs: list[tuple[str, object]]) -> dict:
    """The pairs as a dictionary. Raises ValueError for a name that occurs twice."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return found
