"""What the owner of a retriever publishes so that queries find it: additive sums, pilots, utilities; never a text.

Knows the arrays and how sums become matrices; knows nothing of files, models or routers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from experts.retrieval_info import (
    BASE_NAME,
    Metric,
    PilotGroup,
    PilotsInfo,
    RetrievalInfo,
    RetrievalNoise,
    ScoresInfo,
    Split,
    StateInfo,
    UtilityInfo,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "BASE_NAME",
    "Moments",
    "Pilot",
    "RetrievalArtifacts",
    "RetrievalInfo",
    "Scores",
    "Utility",
    "packed",
    "unpacked",
]


_SCORES = ("counts", "quality", "vectors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Additive sums over vectors, in float64: n, Σx and, or not, Σxxᵀ (not centred).

    The sum of two owners' moments is what both queries' moments are, in whatever order owners come.
    """

    count: int
    sum: NDArray[np.float64]
    """``(d,)``."""
    scatter: NDArray[np.float64] | None
    """``(d, d)``, symmetric."""

    @classmethod
    def from_vectors(cls, x: NDArray[np.floating], *, second_moment: bool = True) -> Self:
        """Sum up ``x`` ``(n, d)``, any float dtype."""
        import numpy as np

        wide = np.asarray(x, dtype=np.float64)
        return cls(count=len(wide), sum=wide.sum(axis=0), scatter=wide.T @ wide if second_moment else None)

    def __add__(self, other: Moments) -> Moments:
        both = self.scatter is not None and other.scatter is not None
        return Moments(
            count=self.count + other.count,
            sum=self.sum + other.sum,
            scatter=self.scatter + other.scatter if both else None,  # type: ignore[operator]
        )

    @property
    def mean(self) -> NDArray[np.float64]:
        """Σx / n, ``(d,)``."""
        return self.sum / self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Pilot:
    """The mean base embedding of those queries of an owner's that ``expert`` serves best."""

    expert: str
    """``owner/expert``, or `BASE_NAME`."""
    queries: int
    vector: NDArray[np.float64]
    """``(d,)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Utility:
    """Sums for a ridge regression of each expert's quality on the base embedding of a query."""

    queries: int
    experts: tuple[str, ...]
    gram: NDArray[np.float64]
    """XᵀX ``(d, d)``."""
    cross: NDArray[np.float64]
    """XᵀY ``(d, 1 + len(experts))``; the first column is the base's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The quality that experts reach on an owner's queries, in bundles that no expert had a part in forming."""

    experts: tuple[str, ...]
    counts: NDArray[np.float64]
    """Queries of each bundle, whole numbers, ``(rows,)``."""
    vectors: NDArray[np.float64]
    """Mean base embedding of each bundle, ``(rows, d)``."""
    quality: NDArray[np.float64]
    """Mean quality on each bundle, ``(rows, 1 + len(experts))``; the first column is the base's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalArtifacts:
    """The retrieval artefacts of one expert, or of public text, in memory.

    Attributes:
        info: What there is.
        embedding: Sums over the base's embeddings of the owner's queries.
        state: Sums over the states entering layer ``info.state.layer``, see `StateInfo`.
        static: Sums over the queries' mean token embeddings, see `RetrievalInfo.static_tokens`.
        pilots: In the order of ``info.pilots.groups``.
        utility: Sums for `Utility`.
        scores: Quality row by row, see `Scores`.
    """

    info: RetrievalInfo
    embedding: Moments
    state: Moments | None = None
    static: Moments | None = None
    pilots: tuple[Pilot, ...] = ()
    utility: Utility | None = None
    scores: Scores | None = None

    @classmethod
    def create(
        cls,
        *,
        embedding: Moments,
        normalization: Literal["l2", "none"],
        min_group: int = 1,
        state: Moments | None = None,
        state_layer: int | None = None,
        static: Moments | None = None,
        pilots: Sequence[Pilot] = (),
        pilots_split: Split = "train",
        pilots_metric: Metric = "own",
        utility: Utility | None = None,
        utility_split: Split = "heldout",
        utility_metric: Literal["margin", "ndcg@10", "mrr@10"] = "margin",
        scores: Scores | None = None,
        scores_split: Split = "heldout",
        scores_metric: Literal["margin", "ndcg@10", "mrr@10"] = "margin",
        noise: RetrievalNoise | None = None,
    ) -> Self:
        """Put artefacts together; pilots of fewer than ``min_group`` queries are left out.

        Raises:
            pydantic.ValidationError: The sums themselves stand for fewer than ``min_group`` queries, or a name is not
                an expert's.
        """
        kept = tuple(sorted((p for p in pilots if p.queries >= min_group), key=lambda p: p.expert))
        groups = tuple(PilotGroup(expert=pilot.expert, queries=pilot.queries) for pilot in kept)
        info = RetrievalInfo(
            queries=embedding.count,
            dimension=len(embedding.sum),
            normalization=normalization,
            second_moment=embedding.scatter is not None,
            min_group=min_group,
            state=None if state_layer is None else StateInfo(layer=state_layer),
            static_tokens=static is not None,
            pilots=PilotsInfo(split=pilots_split, metric=pilots_metric, groups=groups) if groups else None,
            utility=None
            if utility is None
            else UtilityInfo(
                split=utility_split,
                metric=utility_metric,
                queries=utility.queries,
                experts=utility.experts,
            ),
            scores=None
            if scores is None
            else ScoresInfo(
                split=scores_split,
                metric=scores_metric,
                queries=int(scores.counts.sum()),
                rows=len(scores.counts),
                experts=scores.experts,
            ),
            noise=noise,
        )
        return cls(
            info=info,
            embedding=embedding,
            state=state,
            static=static,
            pilots=kept,
            utility=utility,
            scores=scores,
        )

    def tensors(self) -> dict[str, NDArray[np.float64]]:
        """Return what goes into the routing file: see `experts.retrieval_checks.retrieval_tensors`."""
        import numpy as np

        found = {}
        places = (("embedding", self.embedding), ("state", self.state), ("static", self.static))
        for place, moments in places:
            if moments is not None:
                found[f"retrieval.{place}.sum"] = moments.sum
                if moments.scatter is not None:
                    found[f"retrieval.{place}.scatter"] = packed(moments.scatter)
        if self.pilots:
            found["retrieval.pilots"] = np.stack([pilot.vector for pilot in self.pilots]).astype(np.float64)
        if self.utility is not None:
            found["retrieval.utility.gram"] = packed(self.utility.gram)
            found["retrieval.utility.cross"] = np.asarray(self.utility.cross, dtype=np.float64)
        if self.scores is not None:
            for name in _SCORES:
                found[f"retrieval.scores.{name}"] = np.asarray(getattr(self.scores, name), dtype=np.float64)
        return found

    @classmethod
    def from_tensors(cls, info: RetrievalInfo, tensors: Mapping[str, NDArray[np.floating]]) -> Self:
        """The reverse of `tensors`; what was read from a file has been checked by then."""
        groups = info.pilots.groups if info.pilots else ()
        rows = tensors["retrieval.pilots"] if groups else ()
        return cls(
            info=info,
            embedding=_moments("embedding", info, tensors),
            state=_moments("state", info, tensors) if info.state else None,
            static=_moments("static", info, tensors) if info.static_tokens else None,
            pilots=tuple(
                Pilot(expert=group.expert, queries=group.queries, vector=row.astype("float64", copy=False))
                for group, row in zip(groups, rows, strict=True)
            ),
            utility=Utility(
                queries=info.utility.queries,
                experts=info.utility.experts,
                gram=unpacked(tensors["retrieval.utility.gram"]),
                cross=tensors["retrieval.utility.cross"].astype("float64", copy=False),
            )
            if info.utility
            else None,
            scores=Scores(
                experts=info.scores.experts,
                **{
                    name: tensors[f"retrieval.scores.{name}"].astype("float64", copy=False)
                    for name in _SCORES
                },
            )
            if info.scores
            else None,
        )


def _moments(place: str, info: RetrievalInfo, tensors: Mapping[str, NDArray[np.floating]]) -> Moments:
    scatter = tensors.get(f"retrieval.{place}.scatter")
    return Moments(
        count=info.queries,
        sum=tensors[f"retrieval.{place}.sum"].astype("float64", copy=False),
        scatter=None if scatter is None else unpacked(scatter),
    )


def packed(matrix: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the upper triangle of a symmetric ``(d, d)`` row by row: ``(d (d + 1) / 2,)``."""
    import numpy as np

    return np.ascontiguousarray(matrix[np.triu_indices(len(matrix))], dtype=np.float64)


def unpacked(triangle: NDArray[np.floating]) -> NDArray[np.float64]:
    """The reverse of `packed`; symmetric to the bit."""
    import numpy as np

    width = (math.isqrt(8 * len(triangle) + 1) - 1) // 2
    matrix = np.zeros((width, width), dtype=np.float64)
    matrix[np.triu_indices(width)] = triangle
    return matrix + np.triu(matrix, 1).T
