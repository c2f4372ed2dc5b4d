"""Tables for people: rows that are dataclasses -> plain text, Markdown or cells for a page."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

WIDTH = 100  # characters of a console line
_SHORTEST = 10  # characters that are left of a text, however narrow the table has to be


@dataclass(frozen=True)
class Grid:
    """What a table shows. Texts stand to the left, numbers to the right."""

    headings: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    left: tuple[bool, ...]
    """By column: whether it holds texts."""


def grid(rows: Sequence[Any]) -> Grid:
    """One column for each field of the rows' dataclass, headed by its name; without those that are empty or zero
    everywhere. There must be a row.
    """
    values = [astuple(row) for row in rows]
    shown = [(i, field) for i, field in enumerate(fields(rows[0])) if any(line[i] for line in values)]
    return Grid(
        headings=tuple(field.name.replace("_", " ") for _, field in shown),
        cells=tuple(tuple(_shown(line[i]) for i, _ in shown) for line in values),
        left=tuple(isinstance(values[0][i], str) for i, _ in shown),
    )


def text(rows: Sequence[Any], width: int = WIDTH) -> str:
    """Aligned columns under two lines of headings; the first text gives way where they are too wide together."""
    table = grid(rows)
    upper, lower = zip(*(_two_lines(heading) for heading in table.headings), strict=True)
    lines = [line for line in (upper, lower) if any(line)] + list(table.cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.left))]
    gap, excess = "  ", sum(widths) + 2 * (len(widths) - 1) - width
    if excess > 0 and any(table.left):
        flexible = table.left.index(True)
        shorter = min(widths[flexible], max(_SHORTEST, widths[flexible] - excess))
        excess -= widths[flexible] - shorter
        widths[flexible] = shorter
        gap = " " if excess > 0 else gap
    return "\n".join(
        gap.join(
            _shortened(cell, size).ljust(size) if is_left else cell.rjust(size)
            for cell, size, is_left in zip(line, widths, table.left, strict=True)
        ).rstrip()
        for line in lines
    )


def markdown(rows: Sequence[Any]) -> str:
    """A Markdown table."""
    table = grid(rows)
    rule = [":--" if is_left else "--:" for is_left in table.left]
    lines = [table.headings, rule, *table.cells]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def number(value: float) -> str:
    """At most three decimals, none where there are none: 10, 2.5, 0.042."""
    return f"{value:.3f}".rstrip("0").rstrip(".")


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return number(value) if isinstance(value, float) else str(value)


def _two_lines(heading: str) -> tuple[str, str]:
    """The last word below the others."""
    start, _, end = heading.rpartition(" ")
    return start, end


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
