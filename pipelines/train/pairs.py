"""An owner's queries and the documents that answer them, and how they are split so that no document is on two sides.

Reads pairs, documents that bring their own queries (titles, first sentences), and test collections. Knows files and
texts; knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experts.errors import DataError
from experts.names import unknown_name
from pipelines.retrieval.collection import is_unicode, read_collection

__all__ = ["Domain", "DomainSplit", "read_domain", "split_domain"]

_PAIR_KEYS = ("query", "document")
_DOCUMENT_KEYS = ("_id", "id", "title", "text", "owner", "metadata", "url")
_SENTENCE = re.compile(r"(?s)(.{10,300}?[.!?])\s+(.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """Queries, documents, and grades above 0 of those that answer a query.

    Attributes:
        documents: Texts, each once.
        queries: Texts, each once.
        judgements: For each query the grade by number of document.
    """

    documents: tuple[str, ...]
    queries: tuple[str, ...]
    judgements: tuple[Mapping[int, int], ...]

    def digest(self) -> str:
        """sha256 of all of it, to recognise the same data."""
        graded = [sorted(grades.items()) for grades in self.judgements]
        body = json.dumps([self.documents, self.queries, graded])
        return hashlib.sha256(body.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSplit:
    """Which queries are trained on, kept for comparing experts, and measured with.

    No query is in two of them, and no document that answers a query of one answers a query of another: such a pair is
    left out of training first, then of the labels.

    Attributes:
        train: Numbers of queries, with the documents that answer them.
        label: The same, for comparing experts.
        test: The same, for measuring.
        negatives: Documents that training may see: all but those that answer label and test queries.
    """

    train: Mapping[int, tuple[int, ...]]
    label: Mapping[int, tuple[int, ...]]
    test: Mapping[int, tuple[int, ...]]
    negatives: tuple[int, ...]


def read_domain(
    paths: Iterable[Path], *, pairs: Literal["auto", "title", "first-sentence"] = "auto"
) -> Domain:
    """Read an owner's data.

    Args:
        paths: ``.jsonl`` files with ``query`` and ``document`` a line, or with ``text`` and ``title``; folders with
            ``corpus.jsonl``, ``queries.jsonl`` and ``qrels.tsv``.
        pairs: What asks for a document that comes without queries.

    Raises:
        DataError: A file is missing or has a line of another form, or there is no pair in all of them. Messages name
            files and lines, never their content.
    """
    made = _Collector()
    for path in paths:
        if path.is_dir():
            made.add_collection(path)
        else:
            for number, record in _records(path):
                where = f"{path.name}, line {number}"
                if "query" in record or "document" in record:
                    made.add(_text(record, "query", where), _text(record, "document", where))
                else:
                    made.add(*_own_query(record, where, pairs))
    return made.domain()


class _Collector:
    """Gathers pairs; equal texts become one document, and one query."""

    def __init__(self) -> None:
        self._documents: dict[str, int] = {}
        self._queries: dict[str, dict[int, int]] = {}

    def add(self, query: str, document: str, *, grade: int = 1) -> None:
        number = self._documents.setdefault(document, len(self._documents))
        grades = self._queries.setdefault(query, {})
        grades[number] = max(grade, grades.get(number, 0))

    def add_collection(self, folder: Path) -> None:
        collection = read_collection(folder)
        texts = {document.id: document.text for document in collection.documents}
        for text in texts.values():
            self._documents.setdefault(text, len(self._documents))
        for query, grades in collection.judgements.items():
            for document, grade in grades.items():
                if grade > 0:
                    self.add(collection.queries[query], texts[document], grade=grade)

    def domain(self) -> Domain:
        if not self._queries:
            raise DataError("The data hold no pair of a query and a document.")
        return Domain(
            documents=tuple(self._documents),
            queries=tuple(self._queries),
            judgements=tuple(self._queries.values()),
        )


def _records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    if not path.is_file():
        raise DataError(f"{path.name} is not a regular file. Write the pairs to a file first.")
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _record(line, f"{path.name}, line {number}")
    except OSError as error:
        raise DataError(f"{path.name} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 (byte {error.start}). Convert it first.") from error


def _record(line: str, where: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # a number of thousands of digits is a ValueError of its own
        raise DataError(f"{where}: not JSON. Write one object a line.") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: not a JSON object. Write one a line.")
    known = _PAIR_KEYS if "query" in record or "document" in record else _DOCUMENT_KEYS
    for key in record:
        if key not in known:
            raise DataError(f"{where}: {unknown_name('key', key, known)}")
    return record


def _text(record: Mapping[str, object], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'{where}: no text under "{key}".')
    if not is_unicode(value):
        raise DataError(f'{where}: half of a surrogate pair under "{key}". Write the text as UTF-8.')
    return value.strip()


def _own_query(record: Mapping[str, object], where: str, pairs: str) -> tuple[str, str]:
    """A document's own query, and the document without it."""
    text = _text(record, "text", where)
    if pairs == "title" or (pairs == "auto" and record.get("title")):
        return _text(record, "title", where), text
    if pairs == "auto":
        raise DataError(
            f'{where}: a document without a title, and no query. Write "query" and "document", give it a "title", or '
            "choose retrieval.pairs: first-sentence."
        )
    parts = _SENTENCE.fullmatch(text)
    if parts is None:
        raise DataError(f"{where}: the text has no first sentence that could be taken out of it.")
    return parts[1], parts[2]


def split_domain(domain: Domain, *, test: float, label: float) -> DomainSplit:
    """Split by the digest of each query, so that a query stays on its side when others come and go.

    Args:
        domain: The data.
        test: Share of the queries to measure with.
        label: Share kept for comparing experts.

    Raises:
        DataError: Nothing is left to train on.
    """
    ranked = sorted(range(len(domain.queries)), key=lambda query: _position(domain.queries[query]))
    positions = [_position(domain.queries[query]) for query in ranked]
    in_test = sum(position < test for position in positions)
    in_label = sum(test <= position < test + label for position in positions)
    if test > 0 and len(ranked) > 1:
        in_test = min(max(in_test, 1), len(ranked) - 1)
    sides = ranked[:in_test], ranked[in_test : in_test + in_label], ranked[in_test + in_label :]
    taken: set[int] = set()
    parts = []
    for side in sides:
        free = {query: tuple(d for d in domain.judgements[query] if d not in taken) for query in sorted(side)}
        parts.append({query: answers for query, answers in free.items() if answers})
        taken.update(document for answers in free.values() for document in answers)
        if side is not sides[-1]:
            reserved = frozenset(taken)
    if not parts[2]:
        raise DataError(
            f"Of {len(domain.queries)} queries none is left to train on beside those that are kept out. Give more "
            "data, or lower held_out and retrieval.label."
        )
    return DomainSplit(
        test=parts[0],
        label=parts[1],
        train=parts[2],
        negatives=tuple(n for n in range(len(domain.documents)) if n not in reserved),
    )


def _position(text: str) -> float:
    """Where between 0 and 1 a text's digest lies."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
