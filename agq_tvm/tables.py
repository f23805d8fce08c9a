"""Plain text tables."""


def as_table(rows: list[tuple[str, ...]]) -> str:
    """Align columns by padding with spaces.

    Examples
    --------
    >>> print(as_table([("a", "1"), ("long", "2")]))
    a     1
    long  2
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def as_markdown_table(rows: list[tuple[str, ...]]) -> str:
    """Write rows, the first of which names the columns, as a table in Markdown.

    Examples
    --------
    >>> print(as_markdown_table([("test", "t/s"), ("pp512", "1")]))
    | test | t/s |
    |---|---|
    | pp512 | 1 |
    """
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def megabytes(size: int) -> str:
    """Write a size in bytes as megabytes."""
    return f"{size / 1e6:.1f} MB"
