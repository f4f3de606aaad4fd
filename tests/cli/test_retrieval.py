"""``coterie index`` and ``coterie search`` with a stock pico embedder: documents in, documents out, owners left out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = {"acme": "ba be bi bo bu", "bob": "ka ke ki ko ku", None: "za ze zi zo zu"}


def _write(path: Path, owners: list[str | None], *, start: int = 0) -> Path:
    rows = [
        {
            "_id": f"d{number}",
            "text": f"{WORDS[owner]} {WORDS[owner]} n{number}",
            **({"owner": owner} if owner else {}),
        }
        for number, owner in enumerate(owners, start=start)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def made(run: Callable[..., Any], pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retrieval")
    corpus = _write(folder / "corpus.jsonl", ["acme", "bob", None] * 4)
    outcome = run("index", folder / "index", "--base", pico.embedder(), "--corpus", corpus, "--json")
    assert outcome.code == 0, outcome.err
    assert (outcome.json["added"], outcome.json["documents"]) == (12, 12)
    assert outcome.json["documents_per_second"] > 0
    return folder


@pytest.fixture
def index(made: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(made / "index", tmp_path / "index"))


def _ids(outcome: Any) -> list[str]:
    assert outcome.code == 0, outcome.err
    return [hit["id"] for hit in outcome.json["documents"]]


def test_search_finds_what_is_alike(run: Callable[..., Any], made: Path, pico: Any) -> None:
    outcome = run("search", made / "index", pico.embedder(), WORDS["bob"], "--top-k", 4, "--json")
    assert sorted(_ids(outcome)) == ["d1", "d10", "d4", "d7"]
    assert outcome.json["documents"][0]["owner"] == "bob"
    assert (outcome.json["owner"], outcome.json["weights"], outcome.json["opt_out"]) == (
        None,
        {"base": 1.0},
        [],
    )
    shown = run("search", made / "index", pico.embedder(), WORDS["bob"], "--top-k", 2)
    lines = shown.out.splitlines()
    assert lines[0] == "answered by the base (base 100%)"
    assert lines[1].split() == ["RANK", "SCORE", "DOCUMENT", "OWNER"]
    assert [line.split()[-1] for line in lines[2:]] == ["bob", "bob"]


def test_left_out_owners_documents_are_not_found(run: Callable[..., Any], made: Path, pico: Any) -> None:
    outcome = run("search", made / "index", pico.embedder(), WORDS["bob"], "--opt-out", "bob", "--json")
    assert not {"d1", "d4", "d7", "d10"} & set(_ids(outcome))
    assert len(_ids(outcome)) == 8
    assert outcome.json["opt_out"] == ["bob"]


def test_documents_come_and_go(run: Callable[..., Any], index: Path, pico: Any, tmp_path: Path) -> None:
    more = _write(tmp_path / "more.jsonl", [None, None], start=12)
    added = run(
        "index", "add", index, "--model", pico.embedder(), "--corpus", more, "--owner", "zoe", "--json"
    )
    assert added.json["documents"] == 14
    removed = run("index", "remove", index, "--owner", "acme", "--id", "d1")
    assert removed.out == "Removed 5 documents; 9 are left.\n"
    shown = run("index", "show", index, "--json").json
    assert (shown["owners"], shown["unowned"], shown["documents"]) == ({"bob": 3, "zoe": 2}, 4, 9)
    assert run("index", "show", index).out.splitlines()[-1].split() == ["-", "4"]
    again = run("index", "add", index, "--model", pico.embedder(), "--corpus", more)
    assert again.code == 2
    assert again.err == (
        "Error: 2 of these documents are in the index already, 'd12' for one. Give --replace to put these in their "
        "places.\n"
    )
    replaced = run("index", "add", index, "--model", pico.embedder(), "--corpus", more, "--replace", "--json")
    assert replaced.json["documents"] == 9
    assert run("index", "show", index, "--json").json["owners"] == {"bob": 3}


def test_what_cannot_be_done_is_said(run: Callable[..., Any], made: Path, pico: Any, tmp_path: Path) -> None:
    index, base, corpus = made / "index", pico.embedder(), made / "corpus.jsonl"
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\x00\x01\x02")
    other = pico.embedder(seed=1)
    cases: list[tuple[tuple[Any, ...], str]] = [
        (("search", index, base, " "), "The query is empty. Write what to look for."),
        (
            ("search", index, base, "ba", "--opt-out", "bobb"),
            "Unknown owner 'bobb'. Did you mean 'bob'? Known: acme",
        ),
        (("search", index, other, "ba"), f"{index} was built by another base ("),
        (
            ("search", tmp_path, base, "ba"),
            f"{tmp_path} is not an index: it holds no index.json. Make one with",
        ),
        (("search", index, tmp_path, "ba"), f"{tmp_path} is no embedding model: "),
        (
            ("index", tmp_path / "new", "--base", base, "--corpus", binary),
            "binary.jsonl, line 1: not UTF-8 text",
        ),
        (
            ("index", index, "--base", base, "--corpus", corpus),
            f"{index} exists already. Choose another folder",
        ),
        (
            ("index", "add", index, "--base", other, "--corpus", corpus, "--replace"),
            f"{index} was built by another base",
        ),
        (("index", "remove", index), "Say what to remove: --id or --owner."),
        (
            ("index", "remove", index, "--owner", "bobb"),
            "Unknown owner of documents 'bobb'. Did you mean 'bob'?",
        ),
        (("index", "remove", index, "--id", "x"), "The index holds no document 'x' (1 of 1 are unknown)."),
    ]
    for arguments, message in cases:
        outcome = run(*arguments)
        assert (outcome.code, outcome.err.startswith(f"Error: {message}")) == (2, True), outcome.err
    assert not (tmp_path / "new").exists()


def test_a_long_query_is_cut_and_that_is_said(run: Callable[..., Any], made: Path, pico: Any) -> None:
    outcome = run("search", made / "index", pico.embedder(), "ba " * 10_000, "--json")
    assert outcome.code == 0
    assert outcome.err == "Note: the query has 10,002 tokens; the model reads the first 64.\n"
