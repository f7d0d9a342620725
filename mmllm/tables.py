"""Rows of text as a table: aligned for a terminal, or in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """One line per row, columns padded to their widest cell.

    Args:
        rows: all of one length.
        left: how many columns, from the first one, are aligned to the left; the rest to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def markdown(rows: Sequence[Sequence[str]], right: bool = True) -> list[str]:
    """A Markdown table whose first row is its head.

    Args:
        rows: all of one length.
        right: align all columns but the first to the right.
    """
    rule = ["---"] + ["---:" if right else "---"] * (len(rows[0]) - 1)
    return ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]
