"""Tables for people, of rows that are dictionaries."""

from typing import Any

Row = dict[str, Any]


def show(rows: list[Row]) -> None:
    """Print one table with a column for every name that any row has; rows of a single text go before it."""
    for row in rows:
        if len(row) == 1:
            print(*row.values())
    rows = [row for row in rows if len(row) > 1]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    texts = [[_short(row.get(name, "")) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
    for line in [columns, *texts]:
        print("  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip(), flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
