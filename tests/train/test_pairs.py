"""Pairs: what is read from which file, and a split in which no query and no answer is on two sides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import DataError
from pipelines.train.pairs import Domain, read_domain, split_domain

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(*records: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return make


def test_pairs(write: Write) -> None:
    path = write(
        {"query": "a?", "document": "x"},
        {"query": "b?", "document": " x "},
        {"query": "a?", "document": "y"},
    )
    domain = read_domain([path])
    assert (domain.documents, domain.queries) == (("x", "y"), ("a?", "b?"))
    assert domain.judgements == ({0: 1, 1: 1}, {0: 1})


def test_titles_ask_for_their_texts(write: Write) -> None:
    domain = read_domain([write({"_id": "1", "title": "T", "text": "body", "owner": "acme"})])
    assert (domain.queries, domain.documents) == (("T",), ("body",))


def test_first_sentences_are_taken_out_of_the_text(write: Write) -> None:
    path = write({"title": "T", "text": "What it is about. The rest of it. All."})
    domain = read_domain([path], pairs="first-sentence")
    assert (domain.queries, domain.documents) == (("What it is about.",), ("The rest of it. All.",))


def test_a_collection(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(
        '{"_id": "d1", "title": "T", "text": "one"}\n{"_id": "d2", "text": "two"}\n{"_id": "d3", "text": "three"}\n'
    )
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "which?"}\n')
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\td1\t2\nq\td2\t0\n")
    domain = read_domain([tmp_path])
    assert (domain.queries, domain.documents) == (("which?",), ("T one", "two", "three"))
    assert domain.judgements == ({0: 2},)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"query": "a"}', 'data.jsonl, line 2: no text under "document".'),
        ('{"query": "", "document": "x"}', 'data.jsonl, line 2: no text under "query".'),
        (
            '{"query": "a", "dokument": "x"}',
            "data.jsonl, line 2: Unknown key 'dokument'. Did you mean 'document'? Known: document, query.",
        ),
        (
            '{"text": "x"}',
            'data.jsonl, line 2: a document without a title, and no query. Write "query" and "document", give it a '
            '"title", or choose retrieval.pairs: first-sentence.',
        ),
        ("[1]", "data.jsonl, line 2: not a JSON object. Write one a line."),
        ("{", "data.jsonl, line 2: not JSON. Write one object a line."),
    ],
)
def test_other_lines_are_refused(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "data.jsonl").write_text('{"query": "a", "document": "b"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        read_domain([tmp_path / "data.jsonl"])
    assert str(caught.value) == problem


def test_binary_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError) as caught:
        read_domain([tmp_path / "data.jsonl"])
    assert str(caught.value) == "data.jsonl is not UTF-8 (byte 0). Convert it first."


def test_a_text_without_a_second_sentence(write: Write) -> None:
    with pytest.raises(DataError) as caught:
        read_domain([write({"text": "Only this"})], pairs="first-sentence")
    assert (
        str(caught.value)
        == "data.jsonl, line 1: the text has no first sentence that could be taken out of it."
    )


domains = st.lists(
    st.dictionaries(st.integers(0, 19), st.just(1), min_size=1, max_size=4), min_size=1, max_size=40
).map(
    lambda rows: Domain(
        documents=tuple(f"d{n}" for n in range(20)),
        queries=tuple(f"q{n}" for n in range(len(rows))),
        judgements=tuple(rows),
    )
)


@settings(max_examples=60, deadline=None)
@given(domain=domains, test=st.floats(0, 0.5), label=st.floats(0, 0.5))
def test_nothing_is_on_two_sides(domain: Domain, test: float, label: float) -> None:
    try:
        split = split_domain(domain, test=test, label=label)
    except DataError:
        return
    sides = (split.train, split.label, split.test)
    queries = [set(side) for side in sides]
    answers = [{d for documents in side.values() for d in documents} for side in sides]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not queries[one] & queries[other]
        assert not answers[one] & answers[other]
    assert split.train
    assert answers[0] <= set(split.negatives)
    assert not (answers[1] | answers[2]) & set(split.negatives)
    assert all(set(side[q]) <= set(domain.judgements[q]) for side in sides for q in side)


def many(count: int) -> Domain:
    return Domain(
        documents=tuple(f"d{n}" for n in range(count)),
        queries=tuple(f"q{n}" for n in range(count)),
        judgements=tuple({n: 1} for n in range(count)),
    )


def test_shares_are_about_what_was_asked_for() -> None:
    split = split_domain(many(1000), test=0.2, label=0.1)
    assert 160 < len(split.test) < 240
    assert 70 < len(split.label) < 130
    assert len(split.train) + len(split.label) + len(split.test) == 1000
    assert len(split.negatives) == len(split.train)


def test_a_query_stays_on_its_side_when_others_come() -> None:
    few, more = (split_domain(many(count), test=0.3, label=0.2) for count in (100, 200))
    for side in ("train", "label", "test"):
        assert set(getattr(few, side)) == {query for query in getattr(more, side) if query < 100}


def test_without_shares_everything_is_trained_on() -> None:
    split = split_domain(many(10), test=0.0, label=0.0)
    assert (len(split.train), split.label, split.test) == (10, {}, {})


def test_nothing_left_to_train_on() -> None:
    one_document = Domain(documents=("d",), queries=("a", "b"), judgements=({0: 1}, {0: 1}))
    with pytest.raises(DataError) as caught:
        split_domain(one_document, test=0.5, label=0.0)
    assert str(caught.value) == (
        "Of 2 queries none is left to train on beside those that are kept out. Give more data, or lower held_out and "
        "retrieval.label."
    )
