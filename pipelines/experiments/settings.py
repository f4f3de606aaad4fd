"""The YAML of an experiment: its anchor, domains, budgets, seeds and arms.

Knows fields, ranges and defaults; knows nothing of how an arm is made.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipelines.experiments.kind import ExperimentSettings, Names

__all__ = ["Budget", "Experiment", "ScratchAnchor", "Tuning"]

Count = Annotated[int, Field(strict=True, gt=0)]
Number = Annotated[float, Field(strict=True, gt=0)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ScratchAnchor(_Settings):
    """A small decoder, trained here on the public mix."""

    family: Literal["olmo2", "llama"] = "olmo2"
    """OLMo-2 (norms behind the blocks, as in the paper) or Llama (norms before them)."""
    vocabulary: Count = 2048
    """Size of the byte-pair vocabulary, which is learned from the public mix too."""
    hidden_size: Count = 160
    """Width of the states."""
    intermediate_size: Count = 448
    """Width of the FFNs."""
    layers: Count = 4
    """Decoder layers."""
    heads: Count = 4
    """Attention heads."""
    steps: Count = 500
    """Steps of the optimiser."""
    batch_size: Count = 16
    """Windows in a step."""
    learning_rate: Number = 3e-3
    """Peak rate; a cosine after the warm-up."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of weights and order; the anchor is the same for every seed of the experiment."""


class Budget(_Settings):
    """What every owner spends on an expert."""

    steps: Count = 100
    """Steps of the optimiser."""
    batch_size: Count = 8
    """Windows in a step."""
    learning_rate: Number = 1e-3
    """Peak rate."""


class Tuning(_Settings):
    """Training of routers alone."""

    steps: Count = 40
    """Steps of the optimiser."""
    batch_size: Count = 8
    """Windows in a step."""
    learning_rate: Number = 1e-2
    """Constant rate."""


class Experiment(ExperimentSettings):
    """An experiment as written."""

    FREE: ClassVar[tuple[str, ...]] = ("runner",)

    kind: Literal["flexolmo"] = "flexolmo"
    """This kind."""
    anchor: ScratchAnchor | Literal["smollm2"] = ScratchAnchor()
    """``smollm2``, or the settings of a decoder to train from scratch."""
    domains: Names
    """The owners' domains; names of texts that the project can fetch."""
    public: Names
    """Texts of the public mix."""
    public_share: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Share of every domain's documents that is public as well; no owner trains on it."""
    unowned: Names = ()
    """Texts that are nobody's, to see what routing does to them."""
    layers: str = "all"
    """Layers that have experts, as in a job."""
    sequence_length: Count = 128
    """Tokens in a window."""
    held_out_windows: Count = 32
    """Held-out windows of each domain that are measured."""
    top_k: Count = 2
    """Experts a token, the anchor counted."""
    rank: Count = 16
    """Rank of the low-rank arm."""
    experts: Budget = Budget()
    """What every owner spends."""
    tuning: Tuning = Tuning()
    """What arms with trained routers spend."""
    runner: Literal["local", "ray"] = "local"
    """``ray``: every owner's training in a process and a Ray of its own; ``local``: here, one after the other."""

    @field_validator("domains", "public", "unowned")
    @classmethod
    def _known_texts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        from experts.names import unknown_name
        from pipelines.assets import TEXTS

        for name in value:
            if name not in TEXTS:
                raise ValueError(str(unknown_name("domain text", name, TEXTS)))
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if len(self.domains) < 2:
            problems.append("name at least two domains")
        if not self.public:
            problems.append("name at least one public text")
        shared = sorted(set(self.domains) & ({*self.public} | {*self.unowned}))
        if shared:
            problems.append(f"{', '.join(shared)}: a domain cannot be public or nobody's as well")
        if problems:
            raise ValueError("; ".join(problems))
        return self
