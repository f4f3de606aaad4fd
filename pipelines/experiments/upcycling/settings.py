"""The YAML of the upcycling comparison: its seed model, domains, and the budgets of both phases.

Knows fields, ranges and defaults; knows nothing of how an arm is made.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipelines.experiments.kind import ExperimentSettings, Names
from pipelines.experiments.settings import Budget, Count, Number, ScratchAnchor

__all__ = ["MixturePhase", "UpcyclingExperiment"]

Share = Annotated[float, Field(ge=0, le=0.5)]


class MixturePhase(BaseModel):
    """Training of a mixture, on equal parts of every domain and the general text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    train: Literal["trunk", "all"] = "all"
    """``all``, as published; ``trunk``: the expert FFNs and attention stay as their owners trained them."""
    steps: Count = 60
    """Steps of the optimiser, except where an arm is given equal compute."""
    batch_size: Count = 8
    """Windows in a step."""
    learning_rate: Number = 1e-3
    """Peak rate; a cosine after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """On matrices."""
    load_balancing: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the load-balancing loss."""
    router_z_loss: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the router z-loss."""


class UpcyclingExperiment(ExperimentSettings):
    """An upcycling comparison as written."""

    kind: Literal["upcycling"] = "upcycling"
    """This kind."""
    anchor: ScratchAnchor = ScratchAnchor(family="llama")
    """The seed model, from which every owner's model is branched; trained here on the general mix."""
    domains: Names
    """The owners' domains; names of texts that the project can fetch."""
    general: str
    """The general text. It is in the seed's mix, in every owner's and in the mixture's, and it is measured."""
    public_share: Share = 0.1
    """Share of every domain's documents that is in the general mix as well; no owner trains on it."""
    general_share: Share = 0.1
    """Share of general text in what every owner trains on."""
    sequence_length: Count = 128
    """Tokens in a window."""
    held_out_windows: Count = 16
    """Held-out windows of each domain that are measured."""
    experts: Budget = Budget()
    """What every owner spends on a model."""
    mixture: MixturePhase = MixturePhase()
    """What a mixture is trained for afterwards."""

    @field_validator("domains", "general")
    @classmethod
    def _known_texts(cls, value: tuple[str, ...] | str) -> tuple[str, ...] | str:
        from experts.names import unknown_name
        from pipelines.assets import TEXTS

        for name in (value,) if isinstance(value, str) else value:
            if name not in TEXTS:
                raise ValueError(str(unknown_name("domain text", name, TEXTS)))
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if len(set(self.domains)) < 2:
            problems.append("name at least two domains")
        if self.general in self.domains:
            problems.append(f"{self.general}: a domain cannot be the general text as well")
        if problems:
            raise ValueError("; ".join(problems))
        return self
