"""Collections in both layouts, and one clear message for each kind of damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experts.errors import CoterieError
from pipelines.retrieval import Document, read_collection

_DOCUMENTS = [
    {"_id": "1", "title": "Wings", "text": "lift of a wing", "owner": "acme"},
    {"_id": "2", "title": "", "text": "heat in slabs", "metadata": {}},
    {"_id": "3", "title": "", "text": ""},
]
_QUERIES = [{"_id": "a", "text": "wing lift"}, {"_id": "b", "text": "never judged"}]


def _lines(records: list[dict[str, object]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "tiny"
    made.mkdir()
    (made / "corpus.jsonl").write_text(_lines(_DOCUMENTS))
    (made / "queries.jsonl").write_text(_lines(_QUERIES))
    (made / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\na\t1\t2\na\t2\t0\n")
    return made


def test_the_beir_layout(folder: Path) -> None:
    collection = read_collection(folder)
    assert collection.name == "tiny"
    assert collection.documents == (
        Document(id="1", text="Wings lift of a wing", owner="acme"),
        Document(id="2", text="heat in slabs"),
        Document(id="3", text=""),
    )
    assert collection.queries == {"a": "wing lift"}
    assert collection.judgements == {"a": {"1": 2, "2": 0}}


@pytest.mark.parametrize("name", ["qrels.txt", "qrels.trec", "qrels/test.tsv"])
def test_trec_judgements_and_other_places(folder: Path, name: str) -> None:
    expected = read_collection(folder)
    (folder / "qrels.tsv").unlink()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("a 0 1 2\na 0 2 0\n")
    assert read_collection(folder) == expected


@pytest.mark.parametrize("name", ["qrels.jsonl", "qrels/test.jsonl"])
def test_judgements_as_objects(folder: Path, name: str) -> None:
    expected = read_collection(folder)
    (folder / "qrels.tsv").unlink()
    (folder / name).parent.mkdir(exist_ok=True)
    rows = [("1", 2), ("2", 0.0)]
    (folder / name).write_text(
        _lines([{"query-id": "a", "corpus-id": document, "score": score} for document, score in rows])
    )
    assert read_collection(folder) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"query-id": "a", "corpus-id": "1", "score": 1.5}, "the grade '1.5' is not a whole number."),
        ({"query-id": "a", "corpus-id": "1"}, "the grade 'null' is not a whole number."),
        ({"query-id": "a", "score": 1}, 'no string under "corpus-id".'),
        (
            {"query_id": "a", "corpus-id": "1", "score": 1},
            "Unknown key of a judgement 'query_id'. Did you mean 'query-id'? Known: corpus-id, query-id, score.",
        ),
    ],
)
def test_damaged_judgements_as_objects(folder: Path, line: dict[str, object], message: str) -> None:
    (folder / "qrels.tsv").unlink()
    (folder / "qrels.jsonl").write_text(_lines([line]))
    with pytest.raises(CoterieError) as caught:
        read_collection(folder)
    assert str(caught.value) == f"qrels.jsonl, line 1: {message}"


def _doc(**fields: object) -> str:
    return json.dumps({"_id": "9", "text": "text", **fields}) + "\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("corpus.jsonl", b"\x80\x02}q", "corpus.jsonl, line 1: not UTF-8 text; is this a binary file?"),
        ("corpus.jsonl", b"PK\x00\x03", "corpus.jsonl, line 1: not UTF-8 text; is this a binary file?"),
        ("corpus.jsonl", "a,b\n", "corpus.jsonl, line 1: not JSON. Write one object a line."),
        ("corpus.jsonl", "[1]\n", "corpus.jsonl, line 1: not a JSON object. Write one document a line."),
        (
            "corpus.jsonl",
            f'{{"_id": {"1" * 5000}}}\n',
            "corpus.jsonl, line 1: not JSON. Write one object a line.",
        ),
        (
            "corpus.jsonl",
            _doc(text="\ud800"),
            'corpus.jsonl, line 1: half of a surrogate pair under "text". Write the text as UTF-8.',
        ),
        (
            "corpus.jsonl",
            _doc(_id="\ud800"),
            'corpus.jsonl, line 1: half of a surrogate pair under "_id". Write the text as UTF-8.',
        ),
        ("corpus.jsonl", "\n", "corpus.jsonl holds no document. Write one JSON object a line."),
        (
            "corpus.jsonl",
            _doc() * 2,
            "corpus.jsonl, line 2: the id '9' occurs twice. Ids are unique in a file.",
        ),
        ("corpus.jsonl", _doc(text=3), 'corpus.jsonl, line 1: no string under "text".'),
        ("corpus.jsonl", _doc(_id=3), 'corpus.jsonl, line 1: no string under "_id".'),
        (
            "corpus.jsonl",
            _doc(ownr="acme"),
            "corpus.jsonl, line 1: Unknown key of a document 'ownr'. Did you mean 'owner'? Known: _id, id, metadata, "
            "owner, text, title, url.",
        ),
        (
            "corpus.jsonl",
            _doc(owner="A B"),
            "corpus.jsonl, line 1: 'A B' is not an owner name: use 1 to 64 lower-case letters, digits, '_', '.' or "
            "'-', starting with a letter or digit.",
        ),
        (
            "queries.jsonl",
            '{"_id": "a", "text": " "}\n',
            "queries.jsonl, line 1: the query 'a' is empty. Remove it, or give it a text.",
        ),
        ("queries.jsonl", "", "queries.jsonl holds no query. Write one JSON object a line."),
        ("qrels.tsv", "", "qrels.tsv holds no judgement."),
        (
            "qrels.tsv",
            "a\t1\n",
            "qrels.tsv, line 1: 2 columns; write query, document and grade, separated by tabs.",
        ),
        (
            "qrels.tsv",
            f"a\t1\t{'9' * 400}\n",
            f"qrels.tsv, line 1: the grade '{'9' * 20}' is beyond 1,000,000.",
        ),
        ("qrels.tsv", "a\t1\thigh\n", "qrels.tsv, line 1: the grade 'high' is not a whole number."),
        (
            "qrels.tsv",
            "a\t1\t1\na\t1\t2\n",
            "qrels.tsv, line 2: the document '1' has two grades for the query 'a'.",
        ),
        (
            "qrels.tsv",
            "".join(f"a\tx{number}\t1\n" for number in range(7)),
            "qrels.tsv names 7 ids that corpus.jsonl does not hold: 'x0', 'x1', 'x2', 'x3', 'x4', .... Check that the "
            "files belong together.",
        ),
        (
            "qrels.tsv",
            "z\t1\t1\n",
            "qrels.tsv names 1 ids that queries.jsonl does not hold: 'z'. Check that the files belong together.",
        ),
    ],
)
def test_damage_is_named(folder: Path, file: str, content: str | bytes, message: str) -> None:
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CoterieError) as caught:
        read_collection(folder)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "qrels.tsv").unlink()
    with pytest.raises(CoterieError) as caught:
        read_collection(folder)
    assert str(caught.value) == (
        f"{folder} holds no judgements: none of qrels.tsv, qrels/test.tsv, qrels.txt, qrels.trec, qrels.jsonl, "
        "qrels/test.jsonl is there."
    )
    with pytest.raises(CoterieError) as caught:
        read_collection(folder / "nowhere")
    assert str(caught.value) == (
        f"{folder / 'nowhere'} is not a folder with corpus.jsonl, queries.jsonl and qrels.tsv."
    )
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(CoterieError) as caught:
        read_collection(folder)
    assert str(caught.value) == f"'{folder / 'corpus.jsonl'}' does not exist."
