"""Plain-text tables for the benchmarks and the demo."""

from collections.abc import Mapping, Sequence
from typing import Any

NOT_MEASURED = "-"

Columns = Sequence[tuple[str, str]]


def format_table(columns: Columns, rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats rows as an aligned table with a header line.

    Args:
        columns: (heading, template) pairs; `template.format(**row)` makes the cell.
        rows: Values by name. A value that is missing or None becomes "-".

    Returns:
        The table, without a final newline. Numbers are right-aligned, text is left-aligned.
    """
    cells = [[heading for heading, _ in columns]]
    cells += [[_format_cell(template, row) for _, template in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    lines = ("  ".join(_align(cell, width) for cell, width in zip(line, widths)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def _format_cell(template: str, row: Mapping[str, Any]) -> str:
    try:
        text = template.format(**row)
    except (KeyError, TypeError):  # the value is missing, or None with a numeric format
        return NOT_MEASURED
    return NOT_MEASURED if text == "None" else text


def _align(cell: str, width: int) -> str:
    is_number = cell[:1].isdigit() or cell[:1] in "-+."
    return cell.rjust(width) if is_number else cell.ljust(width)
