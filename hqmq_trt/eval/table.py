"""Tables of reports, and how Markdown writes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table of the report; the first `text_columns` columns are text, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    text_columns: int = 1


def markdown_table(table: Table) -> str:
    """Columns, rows and, after an empty line, the note; without the title. Of a table without rows the note alone."""
    if not table.rows:
        return table.note
    text = table.text_columns
    rules = ["---"] * text + ["---:"] * (len(table.columns) - text)
    lines = [_line(table.columns), f"|{'|'.join(rules)}|", *map(_line, table.rows)]
    return "\n".join([*lines, *(["", table.note] if table.note else [])])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
