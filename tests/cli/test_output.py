"""How values are written for people and for programs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.cli.catalog import layer_ranges
from pipelines.cli.output import human_bytes, human_count, print_fields, print_json, print_table, printable


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_951, "1.0 MB"),
        (269_060_552, "269.1 MB"),
        (5 * 10**15, "5.0 PB"),
        (5 * 10**18, "5000.0 PB"),
    ],
)
def test_human_bytes(count: int, shown: str) -> None:
    assert human_bytes(count) == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0"), (960, "960"), (134_515_008, "134.5 M"), (7_241_732_096, "7.2 G")]
)
def test_human_count(count: int, shown: str) -> None:
    assert human_count(count) == shown


@pytest.mark.parametrize(
    ("layers", "shown"),
    [((), "-"), ((3,), "3"), ((2, 3), "2-3"), ((0, 15, 16, 17), "0, 15-17"), ((1, 3, 5), "1, 3, 5")],
)
def test_layer_ranges(layers: tuple[int, ...], shown: str) -> None:
    assert layer_ranges(layers) == shown


def test_control_characters_are_written_out() -> None:
    assert printable("a\x1b[31mb\r\n\u202ec") == "a\\x1b[31mb\\r\\n\\u202ec"
    assert printable("two\nlines\x07", keep="\n") == "two\nlines\\x07"
    assert printable("Gebühren, 日本") == "Gebühren, 日本"


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(
        [("a", 1, None, True), ("long\x1b", 22, 0.123456, False)],
        columns=("NAME", "N", "F", "OK"),
        empty="-",
        right=("N",),
    )
    assert capsys.readouterr().out == (
        "NAME       N  F       OK\n"
        "a          1  -       yes\n"
        "long\\x1b  22  0.1235  no\n"
    )  # fmt: skip


def test_empty_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([], columns=("A",), empty="There is nothing.")
    assert capsys.readouterr().out == "There is nothing.\n"


def test_fields(capsys: pytest.CaptureFixture[str]) -> None:
    print_fields({"name": "x", "inner": {"long key": (1, 2), "k": ()}, "none": {}, "list": ["a", "b"]})
    assert capsys.readouterr().out == (
        "name: x\ninner:\n  long key: 1, 2\n  k:        -\nnone: -\nlist: a, b\n"
    )


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"path": Path("a/b"), "set": {"b", "a"}, "text": "ü"})
    assert (
        capsys.readouterr().out
        == '{\n  "path": "a/b",\n  "set": [\n    "a",\n    "b"\n  ],\n  "text": "ü"\n}\n'
    )
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        print_json(float("nan"))
