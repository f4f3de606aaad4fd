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

__all__ = [
    "LONGEST",
    "Hit",
    "Vectors",
    "best_hits",
    "check_lengths",
    "check_queries",
    "comparable",
    "error_bound",
    "exact_products",
    "longest",
    "search_exactly",
]

Vectors = NDArray[np.float32]

_CHUNK_BYTES = 1 << 25
_QUERIES = 64
"""Queries looked up in one pass over the matrix."""

LONGEST = 1e18
"""Longest vector: neither its square nor its product with another overflows float32, in whatever order it is summed."""

_TINY = 2.0**-126
"""Smallest normal float32; what is smaller may count as zero."""


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
    names: Sequence[str] | None = None,
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
        names: What messages call the parts: the files that they come from. None: they come from an encoder.

    Raises:
        DataError: Shapes do not fit, a number of a query or of a row that may be found is not finite or out of all
            proportion, or ``k`` is not positive.
    """
    queries = np.asarray(queries, dtype=np.float32)
    check_queries(queries, rows=len(ids), k=k, allow=allow, dimension=dimension)
    hits: list[list[Hit]] = []
    for start in range(0, len(queries), _QUERIES):
        block = queries[start : start + _QUERIES]
        best = [_Best(query, k) for query in block]
        for part, rows, chunk in _chunks(parts, allow):
            largest = longest(chunk)
            if not largest <= LONGEST:  # which NaN is not
                check_lengths(chunk, [ids[row] for row in rows], where=names[part] if names else None)
            products = block @ chunk.T
            for query, found in enumerate(best):
                found.offer(products[query], chunk, rows, largest)
        hits += [found.hits(ids, owners) for found in best]
    return hits


def longest(rows: Vectors) -> float:
    """An upper bound of the rows' lengths, up to rounding; infinite or NaN if a number is."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", rows, rows)
    # a square may be too small for float32, though the number is not
    return float(np.sqrt(float(squares.max(initial=0.0)) + rows.shape[1] * _TINY))


def comparable(rows: Vectors) -> bool:
    """Whether an inner product with any of these can be trusted: numbers are finite, lengths at most `LONGEST`."""
    return len(_too_long(rows)) == 0


def _too_long(rows: Vectors) -> NDArray[np.intp]:
    if longest(rows) <= LONGEST:  # not if it is NaN
        return np.empty(0, dtype=np.intp)
    return np.flatnonzero(~(np.linalg.norm(rows.astype(np.float64), axis=1) <= LONGEST))


def check_lengths(rows: Vectors, ids: Sequence[str], *, where: str | None = None) -> None:
    """Refuse vectors that no inner product can be trusted with: it would rank them, or others, anywhere.

    Args:
        rows: float32 ``(rows, dimension)``.
        ids: Of the rows.
        where: The file that they come from; None: an encoder.

    Raises:
        DataError: A number is not finite, or a vector longer than `LONGEST`.
    """
    wrong = _too_long(rows)
    if len(wrong) and where is None:
        raise DataError(
            f"The vector of document '{ids[wrong[0]]}' holds numbers that are not finite or too large to compare. "
            "Check the encoder."
        )
    if len(wrong):
        raise DataError(
            f"{where} is damaged: the vector of document '{ids[wrong[0]]}' holds numbers that are not finite or too "
            "large to compare. Index the documents again."
        )


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
    if not comparable(queries):
        raise DataError("A query's vector holds numbers that are too large to compare. Check the encoder.")
    if k < 1:
        raise DataError(f"{k} documents were asked for; at least 1 is needed.")
    if allow is not None and allow.shape != (rows,):
        raise DataError(f"A mask of shape {allow.shape} was given; the index holds {rows} documents.")


def _chunks(
    parts: Sequence[Vectors], allow: NDArray[np.bool_] | None
) -> Iterator[tuple[int, NDArray[np.intp], Vectors]]:
    """Yield the number of a part, the numbers of the allowed rows of a piece of it, and those rows."""
    offset = 0
    for number, part in enumerate(parts):
        step = max(1, _CHUNK_BYTES // (4 * part.shape[1]))
        for start in range(0, len(part), step):
            chunk = part[start : start + step]
            rows = np.arange(len(chunk))
            if allow is not None:
                rows = np.flatnonzero(allow[offset + start : offset + start + len(chunk)])
                if len(rows) < len(chunk):
                    chunk = chunk[rows]
            if len(rows):
                yield number, offset + start + rows, chunk
        offset += len(part)


def error_bound(query: NDArray[np.float64], largest: float) -> float:
    """By how much products in float32 may rank a row too low, against rows no longer than ``largest``."""
    terms, length = len(query), float(np.linalg.norm(query))
    # |fl(x.y) - x.y| <= gamma_n |x||y|, gamma_n about n 2^-24 (Higham 2002, 3.5); twice that for the query's cast
    rounding = 4 * terms * 2.0**-24 * length * largest
    # and what is lost where numbers, products or sums are too small for float32, on both sides of the comparison
    return rounding + 2 * terms * _TINY * (2 + length + largest)


def exact_products(rows: Vectors, query: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inner products that rank: elementwise, then summed along the row, the same for a row wherever it stands."""
    products: NDArray[np.float64] = (rows.astype(np.float64) * query).sum(axis=1)
    return products


def best_hits(
    scores: NDArray[np.float64],
    rows: NDArray[np.intp],
    ids: Sequence[str],
    owners: Sequence[str | None],
    *,
    k: int,
) -> list[Hit]:
    """The first ``k`` of candidates; equal scores by id."""
    found = [
        Hit(id=ids[row], score=score, owner=owners[row])
        for score, row in zip(scores.tolist(), rows.tolist(), strict=True)
    ]
    return sorted(found, key=lambda hit: (-hit.score, hit.id))[:k]


class _Best:
    """The candidates of one query so far: every row that may be among the first ``k``."""

    def __init__(self, query: Vectors, k: int) -> None:
        self.query = query.astype(np.float64)
        self.k = k
        self.scores = np.empty(0)
        self.rows = np.empty(0, dtype=np.int64)

    def offer(self, products: NDArray[Any], chunk: Vectors, rows: NDArray[np.intp], largest: float) -> None:
        """Take what may rank among the first ``k`` from one chunk, with its exact score."""
        slack = error_bound(self.query, largest)
        floor = -np.inf
        if len(products) > self.k:
            floor = float(np.partition(products, -self.k)[-self.k])
        if len(self.scores) >= self.k:
            floor = max(floor, float(np.partition(self.scores, -self.k)[-self.k]))
        chosen = np.flatnonzero(products >= floor - slack)
        self.scores = np.concatenate([self.scores, exact_products(chunk[chosen], self.query)])
        self.rows = np.concatenate([self.rows, rows[chosen]])
        if len(self.scores) > self.k:
            kept = self.scores >= np.partition(self.scores, -self.k)[-self.k]
            self.scores, self.rows = self.scores[kept], self.rows[kept]

    def hits(self, ids: Sequence[str], owners: Sequence[str | None]) -> list[Hit]:
        """The first ``k``; equal scores by id."""
        return best_hits(self.scores, self.rows, ids, owners, k=self.k)
