"""The YAML of a comparison of retrievers: base, domains, sizes, budgets and the router that is ours.

Knows fields, ranges and defaults; knows nothing of how an arm is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipelines.experiments.kind import ExperimentSettings, Names

__all__ = ["RetrieverExperiment"]

Count = Annotated[int, Field(strict=True, gt=0)]
Number = Annotated[float, Field(strict=True, gt=0)]


class RetrieverExperiment(ExperimentSettings):
    """A comparison of retrievers as written."""

    FREE: ClassVar[tuple[str, ...]] = ("collections",)

    kind: Literal["router_retriever"] = "router_retriever"
    """This kind."""
    base: str = "minilm"
    """``minilm``, or the path of a sentence-transformers folder."""
    domains: Names
    """The owners' domains; names of pairs that the project can fetch."""
    unseen: Names = ()
    """What nobody trains on: names of pairs, or of folders below ``collections``."""
    collections: Path | None = None
    """A folder of test collections in the BEIR layout; by default that of the variable COTERIE_COLLECTIONS. Those of
    ``unseen`` that are not found are left out with a note."""
    pairs: Count = 800
    """Training pairs of each owner, at most; more than the dimension makes the covariance sound."""
    documents: Count = 500
    """Documents that a domain is searched in: those of the test queries, then others."""
    queries: Count = 120
    """Test queries of a domain, at most."""
    labelled: Count = 64
    """Training queries of each owner that every expert is tried on: what pilots and classifiers are made of."""
    layers: str = "upper-half"
    """Layers that have adapters, as in a job."""
    rank: Count = 8
    """Of the adapters."""
    steps: Count = 60
    """Steps of the optimiser that an owner takes."""
    batch_size: Count = 24
    """Queries in a step."""
    learning_rate: Number = 1e-3
    """Peak rate."""
    router: dict[str, Any] = Field(default_factory=dict)
    """The ``router`` of our arm's manifest where it differs from the defaults."""

    @field_validator("domains")
    @classmethod
    def _known_pairs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        from experts.names import unknown_name
        from pipelines.assets.pairs import PAIRS

        for name in value:
            if name not in PAIRS:
                raise ValueError(str(unknown_name("domain of pairs", name, PAIRS)))
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if len(self.domains) < 2:
            problems.append("name at least two domains")
        shared = sorted(set(self.domains) & set(self.unseen))
        if shared:
            problems.append(f"{', '.join(shared)}: a domain cannot be unseen as well")
        if self.labelled > self.documents:
            problems.append("labelled must not be larger than documents: labelled queries need theirs")
        if problems:
            raise ValueError("; ".join(problems))
        return self
