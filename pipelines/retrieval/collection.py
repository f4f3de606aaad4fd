"""Reads test collections: documents, queries and judgements in the BEIR layout, or judgements as TREC writes them.

Knows files and what may be wrong with them; knows nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Collection as Owners
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader, RawIOBase
from itertools import count
from pathlib import Path
from typing import cast

from composer.optout import owner_names
from experts.errors import CoterieError, DataError
from experts.files import open_regular
from experts.names import check_owner_name, unknown_name

__all__ = [
    "Collection",
    "Document",
    "is_unicode",
    "read_collection",
    "read_corpus",
    "read_judgements",
    "read_queries",
    "without_owners",
]

_DOCUMENT_KEYS = ("_id", "id", "title", "text", "owner", "metadata", "url")
_QUERY_KEYS = ("_id", "id", "text", "metadata")
_JUDGEMENT_KEYS = ("query-id", "corpus-id", "score")
_JUDGEMENT_FILES = (
    "qrels.tsv",
    "qrels/test.tsv",
    "qrels.txt",
    "qrels.trec",
    "qrels.jsonl",
    "qrels/test.jsonl",
)
_LARGEST_GRADE = 1_000_000
_LONGEST_LINE = 1 << 24
_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One document.

    Attributes:
        id: Unique in its corpus.
        text: What is embedded: title and text.
        owner: Whose it is, for leaving an owner's documents out of results; None: nobody's.
    """

    id: str
    text: str
    owner: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """A corpus with queries and judgements.

    Attributes:
        name: Of the collection.
        documents: In the order of the file.
        queries: Text by query id; those with judgements only.
        judgements: Grade by query id and document id.
    """

    name: str
    documents: Sequence[Document]
    queries: Mapping[str, str]
    judgements: Mapping[str, Mapping[str, int]]


def read_collection(folder: Path, *, name: str | None = None) -> Collection:
    """Read a folder with ``corpus.jsonl``, ``queries.jsonl`` and judgements.

    Judgements are ``qrels.tsv`` or ``qrels/test.tsv`` (BEIR: a heading, then query, document, grade),
    ``qrels.txt`` or ``qrels.trec`` (TREC: query, iteration, document, grade), or ``qrels.jsonl`` or
    ``qrels/test.jsonl`` (an object a line with ``query-id``, ``corpus-id`` and ``score``).

    Raises:
        DataError: A file is missing, is not text, has a line of another form, or judgements name queries or documents
            that there are not.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder with corpus.jsonl, queries.jsonl and qrels.tsv.")
    documents = read_corpus(folder / "corpus.jsonl")
    queries = read_queries(folder / "queries.jsonl")
    path = _judgement_file(folder)
    judgements = read_judgements(path)
    _check_known(judgements, queries, judgements=path, file="queries.jsonl")
    known = {document.id for document in documents}
    judged = dict.fromkeys(document for row in judgements.values() for document in row)
    _check_known(judged, known, judgements=path, file="corpus.jsonl")
    return Collection(
        name=name or folder.name,
        documents=documents,
        queries={query: queries[query] for query in judgements},
        judgements=judgements,
    )


def without_owners(collection: Collection, owners: Owners[str]) -> Collection:
    """Return the collection that these owners' documents never were in.

    Judgements of the documents leave with them, and so do queries to which only they were relevant: nothing that is
    left could answer those.

    Raises:
        DataError: No query is left.
        OptOutError: ``owners`` is no collection of names.
    """
    left_out = owner_names(owners)
    gone = {document.id for document in collection.documents if document.owner in left_out}
    if not gone:
        return collection
    judgements = {
        query: {document: grade for document, grade in judged.items() if document not in gone}
        for query, judged in collection.judgements.items()
        if not _relevant(judged) or _relevant(judged) - gone
    }
    if not judgements:
        whose = {document.owner for document in collection.documents if document.owner in left_out}
        raise DataError(
            f"Every query of the collection '{collection.name}' is answered by documents of "
            f"{', '.join(sorted(filter(None, whose)))} alone, so nothing is left to measure without them. Leave the "
            "collection out."
        )
    return Collection(
        name=collection.name,
        documents=tuple(document for document in collection.documents if document.id not in gone),
        queries={query: collection.queries[query] for query in judgements},
        judgements=judgements,
    )


def _relevant(judged: Mapping[str, int]) -> set[str]:
    return {document for document, grade in judged.items() if grade >= 1}


def read_corpus(path: Path) -> tuple[Document, ...]:
    """Read documents: a JSON object a line with ``_id`` and ``text``, and maybe ``title`` and ``owner``.

    A text may be empty: published collections have such documents, and judgements may name them.

    Raises:
        DataError: The file is missing, is not text, or has a line of another form; an id occurs twice.
    """
    seen: dict[str, Document] = {}
    for number, record in _records(path, _DOCUMENT_KEYS, kind="document"):
        where = f"{path.name}, line {number}"
        key = _identity(record, where, seen)
        parts = _string(record, "title", where), _string(record, "text", where, required=True)
        text = " ".join(part for part in parts if part)
        seen[key] = Document(id=key, text=text, owner=_owner(record, where))
    if not seen:
        raise DataError(f"{path.name} holds no document. Write one JSON object a line.")
    return tuple(seen.values())


def read_queries(path: Path) -> dict[str, str]:
    """Read queries by id: a JSON object a line with ``_id`` and ``text``.

    Raises:
        DataError: The file is missing, is not text, or has a line of another form; a query is empty or occurs twice.
    """
    queries: dict[str, str] = {}
    for number, record in _records(path, _QUERY_KEYS, kind="query"):
        where = f"{path.name}, line {number}"
        key = _identity(record, where, queries)
        queries[key] = _string(record, "text", where, required=True)
        if not queries[key]:
            raise DataError(f"{where}: the query '{key}' is empty. Remove it, or give it a text.")
    if not queries:
        raise DataError(f"{path.name} holds no query. Write one JSON object a line.")
    return queries


def read_judgements(path: Path) -> dict[str, dict[str, int]]:
    """Read grades by query id and document id.

    Three columns (BEIR, the heading is optional) or four (TREC, the second is ignored), separated by tabs or blanks;
    in a ``.jsonl`` file ``query-id``, ``corpus-id`` and ``score``.

    Raises:
        DataError: The file is missing, is not text, or has a line of another form; a pair is judged twice.
    """
    judgements: dict[str, dict[str, int]] = {}
    rows = _judged_objects(path) if path.suffix == ".jsonl" else _judged_columns(path)
    for where, query, document, grade in rows:
        if judgements.setdefault(query, {}).setdefault(document, grade) != grade:
            raise DataError(f"{where}: the document '{document}' has two grades for the query '{query}'.")
    if not judgements:
        raise DataError(f"{path.name} holds no judgement.")
    return judgements


def _judged_columns(path: Path) -> Iterator[tuple[str, str, str, int]]:
    """Where a line stands, its query, document and grade."""
    for number, line in _lines(path):
        columns = line.split("\t") if "\t" in line else line.split()
        if number == 1 and columns[0] in {"query-id", "query_id", "qid"}:
            continue
        where = f"{path.name}, line {number}"
        if len(columns) not in (3, 4):
            raise DataError(
                f"{where}: {len(columns)} columns; write query, document and grade, separated by tabs."
            )
        yield where, columns[0].strip(), columns[-2].strip(), _grade(columns[-1], where)


def _judged_objects(path: Path) -> Iterator[tuple[str, str, str, int]]:
    for number, record in _records(path, _JUDGEMENT_KEYS, kind="judgement"):
        where = f"{path.name}, line {number}"
        query, document = (_string(record, key, where, required=True) for key in _JUDGEMENT_KEYS[:2])
        score = record.get("score")
        # some write every grade with a decimal point
        whole = int(score) if isinstance(score, float) and score.is_integer() else score
        yield where, query, document, _grade(json.dumps(whole), where)


def _grade(text: str, where: str) -> int:
    try:
        grade = int(text)
    except ValueError:
        raise DataError(f"{where}: the grade '{text.strip():.20}' is not a whole number.") from None
    if abs(grade) > _LARGEST_GRADE:
        raise DataError(f"{where}: the grade '{text.strip():.20}' is beyond {_LARGEST_GRADE:,}.")
    return grade


def _judgement_file(folder: Path) -> Path:
    for name in _JUDGEMENT_FILES:
        if (folder / name).exists():
            return folder / name
    raise DataError(f"{folder} holds no judgements: none of {', '.join(_JUDGEMENT_FILES)} is there.")


def _check_known(given: Iterable[str], known: Container[str], *, judgements: Path, file: str) -> None:
    unknown = [key for key in given if key not in known]
    if unknown:
        shown = ", ".join(f"'{key}'" for key in unknown[:_SHOWN]) + (", ..." if len(unknown) > _SHOWN else "")
        raise DataError(
            f"{judgements.name} names {len(unknown)} ids that {file} does not hold: {shown}. Check that the files "
            "belong together."
        )


# ---------------------------------------------------------------- lines


def _records(path: Path, keys: Sequence[str], *, kind: str) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in _lines(path):
        where = f"{path.name}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # a number of thousands of digits is a ValueError of its own
            raise DataError(f"{where}: not JSON. Write one object a line.") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: not a JSON object. Write one {kind} a line.")
        for key in record:
            if key not in keys:
                raise DataError(f"{where}: {unknown_name(f'key of a {kind}', key, keys)}")
        yield number, record


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, blank ones left out."""
    with BufferedReader(cast(RawIOBase, open_regular(path, follow_symlinks=True, error=DataError))) as stream:
        for number in count(1):
            line = stream.readline(_LONGEST_LINE + 1)
            if not line:
                return
            if len(line) > _LONGEST_LINE:
                raise DataError(
                    f"{path.name}, line {number}: longer than {_LONGEST_LINE:,} bytes; is this a text file?"
                )
            if text := _text(line, path, number):
                yield number, text


def _text(line: bytes, path: Path, number: int) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise DataError(f"{path.name}, line {number}: not UTF-8 text; is this a binary file?")
    return text.strip()


# ---------------------------------------------------------------- fields


def _owner(record: Mapping[str, object], where: str) -> str | None:
    owner = _string(record, "owner", where)
    try:
        return check_owner_name(owner) if owner else None
    except CoterieError as error:
        raise DataError(f"{where}: {error}") from None


def _identity(record: Mapping[str, object], where: str, seen: Container[str]) -> str:
    key = record.get("_id", record.get("id"))
    if not isinstance(key, str) or not key.strip():
        raise DataError(f'{where}: no string under "_id".')
    _check_unicode(key, "_id", where)
    if key in seen:
        raise DataError(f"{where}: the id '{key}' occurs twice. Ids are unique in a file.")
    return key


def _string(record: Mapping[str, object], key: str, where: str, *, required: bool = False) -> str:
    value = record.get(key)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        raise DataError(f'{where}: no string under "{key}".')
    _check_unicode(value, key, where)
    return value.strip()


def is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, which JSON lets pass and no tokenizer reads."""
    return text.isascii() or text == text.encode("utf-8", "replace").decode("utf-8")


def _check_unicode(text: str, key: str, where: str) -> None:
    if not is_unicode(text):
        raise DataError(f'{where}: half of a surrogate pair under "{key}". Write the text as UTF-8.')
