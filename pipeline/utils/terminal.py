"""Tables on standard output: drawn by rich on a terminal, plain text in a pipe or a file."""

import sys
from collections.abc import Collection, Iterable, Sequence


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = ()) -> None:
    """Print a table of ``rows`` with the names of ``columns`` as header; columns in ``right`` are right-aligned.

    On a terminal, long cells wrap. In a pipe or a file, each row is one line, with cells two spaces apart.
    """
    cells = [list(row) for row in rows]
    if sys.stdout.isatty():
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for column in columns:
            table.add_column(column, justify="right" if column in right else "left", overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    lines = [list(columns), *cells] if any(columns) else cells
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, cell, width in zip(columns, line, widths, strict=True)
        )
        print("  ".join(padded).rstrip())
