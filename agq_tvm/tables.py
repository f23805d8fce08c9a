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


def megabytes(size: int) -> str:
    """Write a size in bytes as megabytes."""
    return f"{size / 1e6:.1f} MB"
