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
    """The rows of a .csv or .jsonl file, each after its place ("edits.csv, line 3") for messages about it."""
    text = read_text(file)
    if file.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), restkey="a cell without a header")
        return [(f"{file}, line {reader.line_num}", row) for row in reader]
    if file.suffix.lower() != ".jsonl":
        raise InputError(f"{file}: the list must be a .csv or a .jsonl file")
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: its other ends may stand in a text
        if line.strip():
            try:
                rows.append((f"{file}, line {number}", dict(json.loads(line))))
            except (TypeError, ValueError) as error:
                raise InputError(f"{file}, line {number} is not an object in JSON: {error}") from None
    return rows
