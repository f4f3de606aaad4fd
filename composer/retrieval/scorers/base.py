"""The retrieval scorer's contract: facts of a set of experts in, one linear map of a query's feature out.

A scorer that is made of a set of experts is a function of that set alone: everything is summed anew, by name, in
float64, and nothing is ever subtracted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from composer.retrieval.facts import Array, ExpertFacts

if TYPE_CHECKING:
    from composer.retrieval.options import RetrievalRouter

__all__ = ["Need", "RetrievalScorer", "Solved", "unit_rows"]

Need = Literal["sum", "scatter", "pilots", "utility"]
"""Which published sums a scorer is made of."""


def unit_rows(rows: Array) -> Array:
    """Divide every row by its length; a row of zeros stays."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1.0)


@dataclass(frozen=True, kw_only=True)
class Solved:
    """Scores of one set of experts: a matrix product, and what becomes of an expert's several columns.

    Attributes:
        vectors: ``(n, d)``.
        biases: ``(n,)``.
        starts: First row of each expert, ascending, for experts with more than one; None: one row an expert.
        reduce: What becomes of an expert's rows: ``max``, ``logsumexp``, ``top_mean``.
        top: Rows that count in ``top_mean``.
        absent: Positions of experts without any row; they are never chosen.
        unit_queries: Whether features are divided by their length first.
        over_base: Whether a score is a gain over the base rather than a likeness.
    """

    vectors: Array
    biases: Array
    starts: tuple[int, ...] | None = None
    reduce: Literal["max", "logsumexp", "top_mean"] | None = None
    top: int = 1
    absent: tuple[int, ...] = ()
    unit_queries: bool = False
    over_base: bool = False

    def scores(self, features: Array) -> Array:
        """Score ``(rows, d)`` features; returns ``(rows, experts)``."""
        if self.unit_queries:
            features = unit_rows(features)
        return self._reduced(features @ self.vectors.T + self.biases)

    def _reduced(self, products: Array) -> Array:
        if self.starts is None:
            return self._with_absent(products)
        ends = (*self.starts[1:], products.shape[1])
        columns = [self._one(products[:, a:b]) for a, b in zip(self.starts, ends, strict=True)]
        return self._with_absent(np.stack(columns, axis=1))

    def _one(self, products: Array) -> Array:
        highest: Array = products.max(axis=1)
        if self.reduce == "logsumexp":
            total: Array = np.log(np.exp(products - highest[:, None]).sum(axis=1))
            return highest + total
        if self.reduce == "top_mean":
            best: Array = np.sort(products, axis=1)[:, ::-1][:, : self.top].mean(axis=1)
            return best
        return highest

    def _with_absent(self, scores: Array) -> Array:
        if not self.absent:
            return scores
        whole = np.full((len(scores), scores.shape[1] + len(self.absent)), -np.inf)
        whole[:, np.setdiff1d(np.arange(whole.shape[1]), self.absent)] = scores
        return whole

    @property
    def one_row_each(self) -> bool:
        """Whether every expert has one vector, in the experts' order."""
        return self.starts is None and not self.absent

    @cached_property
    def coarse(self) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        """The vectors in float32, for finding candidates among very many experts."""
        return self.vectors.astype(np.float32)

    @cached_property
    def coarse_biases(self) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """The biases in float32."""
        return self.biases.astype(np.float32)

    @cached_property
    def longest(self) -> float:
        """Length of the longest vector."""
        return float(np.linalg.norm(self.vectors, axis=1).max())

    def to_bytes(self) -> bytes:
        """Return what decides every score, for comparing two routers bit for bit."""
        settings = repr(
            (self.starts, self.reduce, self.top, self.absent, self.unit_queries, self.over_base)
        ).encode()
        return b"\0".join([self.vectors.tobytes(), self.biases.tobytes(), settings])


class RetrievalScorer(ABC):
    """Turns what a set of experts published into scores of queries.

    Attributes:
        needs: What every expert must have published.

    Args:
        options: The manifest's ``router``.
        similarity: How features are compared, where the scorer compares.
    """

    needs: ClassVar[frozenset[Need]]

    def __init__(self, options: RetrievalRouter, *, similarity: Literal["cosine", "dot"]) -> None:
        self.options = options
        self.cosine = similarity == "cosine"

    @abstractmethod
    def solve(self, experts: Sequence[ExpertFacts]) -> Solved:
        """Solve for exactly these experts, which come by name; there is at least one."""
