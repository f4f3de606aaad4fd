"""Pairs out of small files of every kind: what asks, what answers, and on which side a document is."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest

from experts.errors import AssetError, UnknownNameError
from pipelines.assets import pairs as module
from pipelines.assets.pairs import PAIRS, Pair, PairSource, domain_pairs

_MODULE = '''
def wing_area(span, chord):
    """Return the area of a wing, as wing_area does.

    More words.
    """
    size = span * chord
    check(size)
    return wing_area if size else size


class Wing:
    """A wing that carries an aeroplane.

    >>> import wings
    >>> wing = Wing(span=10, chord=2)
    >>> wing.area()
    20
    """


def undocumented():
    return 1
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the standard library and for installed packages."""
    package = tmp_path / "wings"
    (package / "tests").mkdir(parents=True)
    (package / "made.py").write_text(_MODULE)
    (package / "broken.py").write_text("def :")
    (package / "tests" / "test_made.py").write_text(_MODULE)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def test_functions_ask_by_docstring_and_hide_their_names(library: Path) -> None:
    assert list(PAIRS["functions"].read(())) == [
        Pair(
            id="wings/made.py:wing_area",
            query="Return the area of a wing, as f does.",
            document="def f(span, chord):\n    size = span * chord\n    check(size)\n    return f if size else size",
        )
    ]


def test_examples_answer_descriptions(library: Path) -> None:
    assert list(module._read_examples("wings")(())) == [
        Pair(
            id="made.py:Wing",
            query="A wing that carries an aeroplane.",
            document="wing = f(span=10, chord=2)\nwing.area()",
        )
    ]
    with pytest.raises(AssetError) as caught:
        list(module._read_examples("feathers")(()))
    assert str(caught.value) == (
        "The package feathers is not installed, whose documentation this domain is made of."
    )


def test_terms_ask_for_titles(tmp_path: Path) -> None:
    path = tmp_path / "icd.xml"
    path.write_text(
        "<a><diag><name>A00</name><desc>Cholera</desc><inclusionTerm><note>Classical cholera</note><note>Other</note>"
        "</inclusionTerm><diag><name>A01</name><desc>Typhoid</desc></diag></diag></a>"
    )
    assert list(PAIRS["icd10"].read([path])) == [
        Pair(id="A00", query="Classical cholera", document="Cholera")
    ]


def test_headlines_ask_for_articles(tmp_path: Path) -> None:
    path = tmp_path / "1.txt"
    path.write_text("Wings are back\n\n" + "An article has many words. " * 10)
    (pair,) = PAIRS["news"].read([path])
    assert pair.query == "Wings are back"
    assert pair.document.startswith("An article has")


def test_sentences_are_taken_out_of_their_passages(monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = [f"Sentence {n} has quite a number of words about surgery in it, indeed." for n in range(40)]
    monkeypatch.setattr(module, "book_text", lambda path, name: "\n".join(sentences))
    found = list(PAIRS["surgery"].read([Path("book")]))
    assert len(found) == 3
    for pair in found:
        assert pair.query in sentences
        assert pair.query not in pair.document
        assert len(pair.document) > 500
    assert found == list(PAIRS["surgery"].read([Path("book")]))


def _source(pairs: Sequence[Pair]) -> PairSource:
    return PairSource(read=lambda files: pairs, asset=None, license="CC0-1.0", source="Invented.")


def test_sides_are_by_document_and_nothing_is_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [Pair(id=f"{n}", query=f"query {n}", document=f"document {n}") for n in range(300)]
    doubles = [
        Pair(id="a", query="Query  7", document="new"),
        Pair(id="b", query="new", document="DOCUMENT 8"),
    ]
    monkeypatch.setitem(PAIRS, "made", _source([*made, *doubles]))
    monkeypatch.setitem(PAIRS, "fewer", _source(made[:200]))
    whole, fewer = domain_pairs("made"), domain_pairs("fewer")
    assert len(whole.training) + len(whole.held_out) == 300
    assert 60 < len(whole.held_out) < 120
    assert not {pair.document for pair in whole.training} & {pair.document for pair in whole.held_out}
    assert set(fewer.training) < set(whole.training)
    assert set(fewer.held_out) < set(whole.held_out)


def test_an_unknown_domain_is_named() -> None:
    with pytest.raises(UnknownNameError, match=r"^Unknown domain of pairs 'icd'\. Did you mean 'icd10'\?"):
        domain_pairs("icd")


def test_assets_of_pairs_are_listed() -> None:
    from pipelines.assets import ASSETS

    assert all(source.asset is None or source.asset in ASSETS for source in PAIRS.values())
