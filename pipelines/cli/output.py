"""Prints results: aligned tables and ``key: value`` blocks for people, JSON for programs.

Knows strings, numbers and terminals; knows nothing of experts. Tables are written by hand instead of with
rich, which takes seconds for the ten thousand rows that ``coterie list`` prints in a fraction of one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

__all__ = [
    "human_bytes",
    "human_count",
    "note",
    "print_fields",
    "print_json",
    "print_line",
    "print_table",
    "printable",
]


def print_line(text: str = "") -> None:
    """Write one line to stdout."""
    sys.stdout.write(f"{text}\n")


def note(text: str) -> None:
    """Write one line for people to stderr, where it cannot mix with a result."""
    sys.stderr.write(f"{text}\n")


def print_json(data: object) -> None:
    """Write ``data`` to stdout as JSON; paths become strings, NaN and infinity are refused."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False, default=_plain) + "\n")


def print_table(
    rows: Iterable[Sequence[object]], *, columns: Sequence[str], empty: str, right: Sequence[str] = ()
) -> None:
    """Write an aligned table to stdout, or the sentence ``empty`` where there are no rows.

    Args:
        rows: Cells in the order of ``columns``; None is shown as ``-``.
        columns: The headings.
        empty: What to say where there is nothing to show.
        right: The headings of the columns aligned to the right.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    if not cells:
        print_line(empty)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    layout = "  ".join(
        f"{{:{'>' if heading in right else '<'}{width}}}"
        for heading, width in zip(columns, widths, strict=True)
    ).format
    sys.stdout.write("".join(f"{layout(*row).rstrip()}\n" for row in ([*columns], *cells)))


def print_fields(fields: Mapping[str, object], *, indent: int = 0) -> None:
    """Write ``key: value`` lines to stdout with the values aligned; a mapping is shown indented below its key."""
    shown = {key: value if value != {} else None for key, value in fields.items()}
    width = max((len(key) for key, value in shown.items() if not isinstance(value, Mapping)), default=0)
    pad = " " * indent
    for key, value in shown.items():
        if isinstance(value, Mapping):
            print_line(f"{pad}{printable(key)}:")
            print_fields(value, indent=indent + 2)
        else:
            label = f"{printable(key)}:"
            print_line(f"{pad}{label:{width + 1}} {_cell(value)}".rstrip())


def printable(text: str, *, keep: str = "") -> str:
    """Return ``text`` with every control character written out, so that a foreign card cannot steer the terminal."""
    if text.isprintable():
        return text
    return "".join(
        char if char in keep or char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def human_bytes(count: int) -> str:
    """Bytes with a decimal unit: ``1234567`` becomes ``1.2 MB``."""
    return _scaled(count, base=1000, units=("bytes", "kB", "MB", "GB", "TB", "PB"))


def human_count(count: int) -> str:
    """A large count with its short suffix: ``134515008`` becomes ``134.5 M``."""
    return _scaled(count, base=1000, units=("", "k", "M", "G", "T", "P"))


def _scaled(count: int, *, base: int, units: Sequence[str]) -> str:
    value = float(count)
    for unit in units:
        # 999.95 would print as 1000.0 of the smaller unit
        if abs(value) < base - 0.05 or unit == units[-1]:
            return f"{value:.0f} {unit}".strip() if unit == units[0] else f"{value:.1f} {unit}"
        value /= base
    raise AssertionError("unreachable")


def _cell(value: object) -> str:
    if isinstance(value, str):
        return printable(value)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(_cell(item) for item in value) or "-"
    return printable(str(value))


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
