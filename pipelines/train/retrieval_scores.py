"""How well experts serve an owner's queries: measured where the queries are, kept there, published in bundles.

An owner measures an expert once. Another expert is another column of the owner's own table, and nobody else's queries
are looked at. Knows pairs, vectors and measures; knows nothing of registries or how an expert encodes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from experts.errors import DataError
from experts.files import write_atomic
from experts.retrieval_artifacts import BASE_NAME, Scores
from pipelines.retrieval.metrics import ndcg, rank, reciprocal_rank
from pipelines.train.pairs import Domain, DomainSplit

if TYPE_CHECKING:
    from experts.retrieval_info import Split

__all__ = ["LabelMetric", "ScoreTable", "bundles"]

Array = NDArray[np.float64]
LabelMetric = Literal["margin", "ndcg@10", "mrr@10"]
Encode = Callable[[Sequence[str]], NDArray[np.floating[Any]]]
"""Texts to vectors ``(texts, d)`` whose products are the base's similarities."""

_DEPTH = 10


class ScoreTable:
    """One owner's labelled queries, the base's vectors of them, and a column for every expert that was tried.

    Args:
        domain: The owner's pairs.
        split: Its sides. Queries come from ``label`` or ``train``; those of ``test`` and the documents that answer them
            are never looked at.
        side: Which queries.
        metric: What a column holds: the similarity of the best right document less that of the best wrong one, or a
            measure of the ranking.
        path: Where columns are kept between calls, in the owner's folder; None: nowhere.
    """

    def __init__(
        self,
        domain: Domain,
        split: DomainSplit,
        *,
        side: Split = "heldout",
        metric: LabelMetric = "margin",
        path: Path | None = None,
    ) -> None:
        answers = split.label if side == "heldout" else split.train
        if not answers:
            raise DataError(
                f"There are no {side} queries to score. Keep some (retrieval.label), or score the train side."
            )
        unseen = {document for documents in split.test.values() for document in documents}
        self.side, self.metric, self.path = side, metric, path
        self.queries = [domain.queries[query] for query in answers]
        self._numbers = [n for n in range(len(domain.documents)) if n not in unseen]
        self.documents = [domain.documents[n] for n in self._numbers]
        place = {number: row for row, number in enumerate(self._numbers)}
        self._judged = [
            {place[n]: grade for n, grade in domain.judgements[query].items() if n in place}
            for query in answers
        ]
        key = json.dumps([self.queries, self.documents, side, metric]).encode()
        self._key = hashlib.sha256(key).hexdigest()
        self._columns: dict[str, Array] = self._read()
        self._vectors: Array | None = None

    def __contains__(self, name: str) -> bool:
        """Whether an expert has been measured."""
        return name in self._columns

    def add_base(self, encode: Encode, documents: NDArray[np.floating[Any]]) -> int:
        """Take the base's vectors of the queries, and measure it; see `add`."""
        self._vectors = np.asarray(encode(self.queries), dtype=np.float64)
        return self.add({BASE_NAME: lambda _: self._base_vectors}, documents)

    @property
    def _base_vectors(self) -> Array:
        if self._vectors is None:
            raise DataError("The base's vectors of the queries are not there yet. Call add_base first.")
        return self._vectors

    def add(self, experts: Mapping[str, Encode], documents: NDArray[np.floating[Any]]) -> int:
        """Measure experts that have no column yet.

        Args:
            experts: How each encodes queries, by ``owner/expert@version``: another version is another column.
            documents: The base's vectors of ``documents``, ``(documents, d)``.

        Returns:
            How many pairs of a query and an expert were measured.
        """
        missing = sorted(set(experts) - set(self._columns))
        for name in missing:
            scores = np.asarray(experts[name](self.queries), dtype=np.float64) @ documents.T.astype(
                np.float64
            )
            self._columns[name] = np.array(
                [self._quality(row, judged) for row, judged in zip(scores, self._judged, strict=True)]
            )
        if missing:
            self._write()
        return len(missing) * len(self.queries)

    def _quality(self, scores: Array, judged: Mapping[int, int]) -> float:
        right = [n for n, grade in judged.items() if grade > 0]
        if self.metric == "margin":
            wrong = np.delete(scores, right)
            return float(scores[right].max() - wrong.max()) if len(wrong) else 0.0
        best = np.argsort(-scores, kind="stable")[: 10 * _DEPTH]
        ranking = rank({f"{n:09d}": float(scores[n]) for n in best}, _DEPTH)
        named = {f"{n:09d}": grade for n, grade in judged.items()}
        measure = ndcg if self.metric == "ndcg@10" else reciprocal_rank
        return measure(ranking, named, k=_DEPTH)

    def published(self, experts: Sequence[str], *, min_group: int) -> Scores:
        """Bundle the queries and average the columns of some experts over the bundles.

        The bundles are formed by the base's vectors alone, so leaving a column out changes nothing else.

        Args:
            experts: Which columns, one version of each expert; all must have been measured.
            min_group: Fewest queries of a bundle.

        Raises:
            DataError: There are fewer queries, or an expert was not measured.
        """
        names = sorted(experts)
        unknown = [name for name in (BASE_NAME, *names) if name not in self._columns]
        if unknown:
            raise DataError(f"Not measured yet: {', '.join(unknown)}.")
        parts = bundles(self._base_vectors, min_group=min_group)
        table = np.stack([self._columns[name] for name in (BASE_NAME, *names)], axis=1)
        return Scores(
            experts=tuple(name.partition("@")[0] for name in names),
            counts=np.array([float(len(part)) for part in parts]),
            vectors=np.stack([self._base_vectors[part].mean(axis=0) for part in parts]),
            quality=np.stack([table[part].mean(axis=0) for part in parts]),
        )

    def _read(self) -> dict[str, Array]:
        if self.path is None or not self.path.is_file():
            return {}
        from safetensors.numpy import load_file

        stored = load_file(self.path)
        prefix = f"{self._key}."
        return {
            name.removeprefix(prefix): column for name, column in stored.items() if name.startswith(prefix)
        }

    def _write(self) -> None:
        if self.path is None:
            return
        from safetensors.numpy import save

        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, save({f"{self._key}.{name}": c for name, c in self._columns.items()}))
        self.path.chmod(0o600)


def bundles(vectors: Array, *, min_group: int) -> list[NDArray[np.int64]]:
    """Divide queries into bundles of alike ones: halves along the direction of most variance, as long as both suffice.

    Args:
        vectors: ``(queries, d)``.
        min_group: Fewest queries of a bundle; with 1 every query is one.

    Returns:
        Rows of each bundle, ascending; the order of the bundles is that of their first rows.

    Raises:
        DataError: There are fewer queries than that.
    """
    if len(vectors) < min_group:
        raise DataError(
            f"{len(vectors)} queries; a bundle must have at least {min_group}, the minimum group size."
        )
    todo, done = [np.arange(len(vectors))], []
    while todo:
        rows = todo.pop()
        half = len(rows) // 2
        if half < min_group:
            done.append(np.sort(rows))
            continue
        centred = vectors[rows] - vectors[rows].mean(axis=0)
        direction = np.linalg.svd(centred, full_matrices=False)[2][0]
        order = rows[np.argsort(centred @ direction, kind="stable")]
        todo += [order[:half], order[half:]]
    return sorted(done, key=lambda rows: int(rows[0]))
