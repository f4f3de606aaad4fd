"""What a card declares of a retriever's routing artefacts: how many queries, where they were summed, which groups.

Knows the declarations and their rules; the numbers themselves are `experts.retrieval_artifacts`' business.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from experts.errors import UnknownNameError
from experts.names import check_expert_name

__all__ = [
    "BASE_NAME",
    "Metric",
    "PilotGroup",
    "PilotsInfo",
    "RetrievalInfo",
    "RetrievalNoise",
    "ScoresInfo",
    "Split",
    "StateInfo",
    "UtilityInfo",
]

BASE_NAME = "base"
"""Stands for the base where experts are named: a query that no expert serves better."""

Metric = Literal["own", "margin", "ndcg@10", "mrr@10"]
"""What made an expert a query's best: being its owner's, the margin of the first right document over the best wrong
one, or a measure of the ranking."""
Split = Literal["train", "heldout"]

_FROZEN = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
_Count = Annotated[int, Field(ge=1)]


class StateInfo(BaseModel):
    """The second place where queries were summed, lower in the encoder, for routing in the very pass that embeds."""

    model_config = _FROZEN

    layer: Annotated[int, Field(ge=0)]
    """The states entering this layer, averaged over the tokens that are not padding, then divided by their length
    (always, whatever the base does with its embeddings)."""


class PilotGroup(BaseModel):
    """The queries of one owner that one expert serves best."""

    model_config = _FROZEN

    expert: str
    """``owner/expert``, or ``base``."""
    queries: _Count

    @field_validator("expert")
    @classmethod
    def _named(cls, expert: str) -> str:
        return _checked_name(expert)


class PilotsInfo(BaseModel):
    """How the owner's queries were grouped; row i of the pilots is the mean embedding of group i."""

    model_config = _FROZEN

    split: Split
    metric: Metric
    groups: Annotated[tuple[PilotGroup, ...], Field(min_length=1, max_length=100_000)]

    @field_validator("groups")
    @classmethod
    def _ascending(cls, groups: tuple[PilotGroup, ...]) -> tuple[PilotGroup, ...]:
        names = [group.expert for group in groups]
        if names != sorted(set(names)):
            raise ValueError("groups must ascend by expert without repetition")
        return groups


class UtilityInfo(BaseModel):
    """Which experts' quality on the owner's queries stands in the utility sums."""

    model_config = _FROZEN

    split: Split
    metric: Literal["margin", "ndcg@10", "mrr@10"]
    queries: _Count
    experts: Annotated[tuple[str, ...], Field(max_length=100_000)]
    """Columns after the first, which is the base's."""

    @field_validator("experts")
    @classmethod
    def _ascending(cls, experts: tuple[str, ...]) -> tuple[str, ...]:
        return _ascending_experts(experts)


class ScoresInfo(BaseModel):
    """How well experts serve an owner's queries, query by query or bundle by bundle.

    Who serves a row best is decided by whoever composes, among the experts that are there: one who has left is not
    compared with.
    """

    model_config = _FROZEN

    split: Split
    metric: Literal["margin", "ndcg@10", "mrr@10"]
    queries: _Count
    rows: Annotated[int, Field(ge=1, le=1_000_000)]
    """Bundles of at least ``min_group`` queries; they were formed by what the base makes of the queries alone, so that
    no expert has a part in it."""
    experts: Annotated[tuple[str, ...], Field(max_length=100_000)]
    """Columns after the first, which is the base's."""

    @field_validator("experts")
    @classmethod
    def _ascending(cls, experts: tuple[str, ...]) -> tuple[str, ...]:
        return _ascending_experts(experts)


class RetrievalNoise(BaseModel):
    """The differential-privacy guarantee of noisy sums over queries. It covers these sums alone, not the weights.

    ``(epsilon, delta)`` for two sets of queries that differ by one query being another, their number being public, and
    for all published sums together; by the analytic Gaussian mechanism (Balle, Wang, arXiv 1805.06530, theorem 8).
    """

    model_config = _FROZEN

    mechanism: Literal["analytic-gaussian"] = "analytic-gaussian"
    unit: Literal["query"] = "query"
    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    release: Literal["mean", "moments"]
    clip_norm: Annotated[float, Field(gt=0)]
    """Longest feature of a query; longer ones were shortened."""
    noise_std: Annotated[float, Field(gt=0)]
    """Standard deviation of the noise on each coordinate of a mean."""


class RetrievalInfo(BaseModel):
    """Which retrieval artefacts a routing file holds."""

    model_config = _FROZEN

    queries: _Count
    """Queries summed."""
    dimension: Annotated[int, Field(ge=1, le=1 << 16)]
    normalization: Literal["l2", "none"]
    """``l2``: the base divides its embeddings by their length. Embeddings are the base's own query embeddings, prompt
    and normalisation included."""
    second_moment: bool
    """Whether Σxxᵀ is there. With fewer queries than dimensions it reveals what the queries span."""
    min_group: _Count
    """No published vector stands for fewer queries than this."""
    state: StateInfo | None = None
    static_tokens: bool = False
    """Whether there are sums over the queries' token embeddings too: the rows of the base's embedding matrix, averaged
    over the tokens that are not padding, then divided by their length."""
    pilots: PilotsInfo | None = None
    utility: UtilityInfo | None = None
    scores: ScoresInfo | None = None
    noise: RetrievalNoise | None = None
    """None: exact sums."""

    @model_validator(mode="after")
    def _large_enough(self) -> Self:
        counts = {"queries": self.queries}
        counts |= {f"pilots of {g.expert}": g.queries for g in (self.pilots.groups if self.pilots else ())}
        counts |= {"utility": self.utility.queries} if self.utility else {}
        counts |= {"a row of scores": self.scores.queries // self.scores.rows} if self.scores else {}
        small = [f"{what}: {count}" for what, count in counts.items() if count < self.min_group]
        if small:
            raise ValueError(
                f"below the minimum group size of {self.min_group} queries, so that nothing may be published: "
                f"{', '.join(small)}"
            )
        return self

    @model_validator(mode="after")
    def _nothing_exact_beside_noise(self) -> Self:
        exact = [name for name in ("pilots", "utility", "scores") if getattr(self, name) is not None]
        if self.noise is not None and exact:
            raise ValueError(f"noise covers the sums alone; {', '.join(exact)} beside it would undo it")
        return self


def _ascending_experts(experts: tuple[str, ...]) -> tuple[str, ...]:
    if list(experts) != sorted(set(experts)) or BASE_NAME in experts:
        raise ValueError("experts must ascend without repetition, the base not among them")
    return tuple(_checked_name(expert) for expert in experts)


def _checked_name(name: str) -> str:
    if name == BASE_NAME:
        return name
    try:
        return check_expert_name(name)
    except UnknownNameError as failure:
        raise ValueError(str(failure)) from None
