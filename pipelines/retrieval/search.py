"""Exact nearest neighbours by inner product: candidates from a fast product, ranked by a reproducible one.

Knows matrices, masks and ids; knows no file. The fast product rounds differently with the shape of its operands, so
it only chooses candidates, within a bound of its error; what ranks them is summed in one order for every row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experts.errors import DataError

__all__ = ["Hit", "Vectors", "check_queries", "search_exactly"]

Vectors = NDArray[np.float32]

_CHUNK_BYTES = 1 << 25
_QUERIES = 64
"""Queries looked up in one pass over the matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A document that was found.

    Attributes:
        id: Of the document.
        score: Inner product in float64.
        owner: Whose it is; None: nobody's.
    """

    id: str
    score: float
    owner: str | None


def search_exactly(
    parts: Sequence[Vectors],
    queries: Vectors,
    *,
    ids: Sequence[str],
    owners: Sequence[str | None],
    k: int,
    allow: NDArray[np.bool_] | None,
    dimension: int,
) -> list[list[Hit]]:
    """Find the ``k`` rows of the largest inner product for every query.

    Args:
        parts: Matrices ``(rows, dimension)`` float32, one after the other.
        queries: float32 ``(queries, dimension)``.
        ids: Of the rows of all parts.
        owners: Of the rows.
        k: How many for each query.
        allow: Which rows may be found; others are never multiplied. None: all.
        dimension: Length of a vector.

    Raises:
        DataError: Shapes do not fit, a number is not finite, or ``k`` is not positive.
    """
    queries = np.asarray(queries, dtype=np.float32)
    check_queries(queries, rows=len(ids), k=k, allow=allow, dimension=dimension)
    hits: list[list[Hit]] = []
    for start in range(0, len(queries), _QUERIES):
        block = queries[start : start + _QUERIES]
        best = [_Best(query, k) for query in block]
        for first, rows, chunk in _chunks(parts, allow):
            products = block @ chunk.T
            largest = np.sqrt(np.einsum("ij,ij->i", chunk, chunk).max(initial=0.0))
            for query, found in enumerate(best):
                found.offer(products[query], chunk, first + rows, largest)
        hits += [found.hits(ids, owners) for found in best]
    return hits


def check_queries(
    queries: Vectors, *, rows: int, k: int, allow: NDArray[np.bool_] | None, dimension: int
) -> None:
    """Refuse what cannot be searched for; see `search_exactly`."""
    if queries.ndim != 2 or queries.shape[1] != dimension:
        raise DataError(
            f"Queries of shape {queries.shape} were given; the index needs (queries, {dimension})."
        )
    if not np.isfinite(queries).all():
        raise DataError("A query's vector holds numbers that are not finite. Check the encoder.")
    if k < 1:
        raise DataError(f"{k} documents were asked for; at least 1 is needed.")
    if allow is not None and allow.shape != (rows,):
        raise DataError(f"A mask of shape {allow.shape} was given; the index holds {rows} documents.")


def _chunks(
    parts: Sequence[Vectors], allow: NDArray[np.bool_] | None
) -> Iterator[tuple[int, NDArray[np.int64], Vectors]]:
    """Yield the number of the first row, the allowed rows counted from it, and those rows."""
    offset = 0
    for part in parts:
        step = max(1, _CHUNK_BYTES // (4 * part.shape[1]))
        for start in range(0, len(part), step):
            chunk = part[start : start + step]
            rows = np.arange(len(chunk))
            if allow is not None:
                rows = np.flatnonzero(allow[offset + start : offset + start + len(chunk)])
                if len(rows) < len(chunk):
                    chunk = chunk[rows]
            if len(rows):
                yield offset + start, rows, chunk
        offset += len(part)


class _Best:
    """The candidates of one query so far: every row that may be among the first ``k``."""

    def __init__(self, query: Vectors, k: int) -> None:
        self.query = query.astype(np.float64)
        self.k = k
        self.scores = np.empty(0)
        self.rows = np.empty(0, dtype=np.int64)

    def offer(self, products: NDArray[Any], chunk: Vectors, rows: NDArray[np.int64], largest: float) -> None:
        """Take what may rank among the first ``k`` from one chunk, with its exact score."""
        # |fl(x.y) - x.y| <= gamma_n |x||y|, gamma_n about n 2^-24 (Higham 2002, 3.5); twice that for the query's cast
        slack = 4 * len(self.query) * 2.0**-24 * float(np.linalg.norm(self.query)) * float(largest)
        floor = -np.inf
        if len(products) > self.k:
            floor = float(np.partition(products, -self.k)[-self.k])
        if len(self.scores) >= self.k:
            floor = max(floor, float(np.partition(self.scores, -self.k)[-self.k]))
        chosen = np.flatnonzero(products >= floor - slack)
        # elementwise, then summed along the row: the same for a row wherever it stands
        exact = (chunk[chosen].astype(np.float64) * self.query).sum(axis=1)
        self.scores = np.concatenate([self.scores, exact])
        self.rows = np.concatenate([self.rows, rows[chosen]])
        if len(self.scores) > self.k:
            kept = self.scores >= np.partition(self.scores, -self.k)[-self.k]
            self.scores, self.rows = self.scores[kept], self.rows[kept]

    def hits(self, ids: Sequence[str], owners: Sequence[str | None]) -> list[Hit]:
        """The first ``k``; equal scores by id."""
        found = [
            Hit(id=ids[row], score=score, owner=owners[row])
            for score, row in zip(self.scores.tolist(), self.rows.tolist(), strict=True)
        ]
        return sorted(found, key=lambda hit: (-hit.score, hit.id))[: self.k]
