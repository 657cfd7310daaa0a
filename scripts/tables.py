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
        The table, without a final newline. Columns of numbers are right-aligned, others left-aligned.
    """
    columns_of_cells = [
        _align([heading, *(_format_cell(template, row) for row in rows)]) for heading, template in columns
    ]
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns_of_cells))


def _format_cell(template: str, row: Mapping[str, Any]) -> str:
    try:
        text = template.format(**row)
    except (KeyError, TypeError):  # the value is missing, or None with a numeric format
        return NOT_MEASURED
    return NOT_MEASURED if text == "None" else text


def _align(cells: list[str]) -> list[str]:
    """Pads the cells of a column, heading first, to equal width and underlines the heading."""
    width = max(map(len, cells))
    is_numeric = all(cell[:1].isdigit() or cell[:1] in "-+." for cell in cells[1:])
    heading, *rest = (cell.rjust(width) if is_numeric else cell.ljust(width) for cell in cells)
    return [heading, "-" * width, *rest]
