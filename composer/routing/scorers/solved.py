"""What the gates that are solved from additive statistics have in common: the classes, and a linear score for each.

Every owner publishes ``(n, sum x, sum x x^T)`` of the states that enter the first expert layer; public text is a
class of its own. Knows how such a gate is asked for and kept per set of experts; knows nothing of how it is solved.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from composer.routing.recent import Recent
from composer.routing.scorers.base import Scorer, ScorerInputs, ScorerOptions
from composer.routing.types import ANCHOR
from experts.routing_artifacts import RoutingInfo, Statistics

__all__ = ["SolvedOptions", "SolvedScorer"]


class SolvedOptions(ScorerOptions):
    """Settings of every solved gate; see `SolvedScorer`."""

    temperature: float = Field(default=1.0, gt=0)
    evidence: float = Field(default=0.5, ge=0, le=1)


class SolvedScorer(Scorer):
    """Linear scores of the allowed classes, solved from the statistics of exactly these classes.

    The gate of a set is solved anew from its members' statistics, in canonical order and float64. Nothing is ever
    subtracted, so leaving an owner out gives, bit for bit, the gate of a composition they never joined.

    Args:
        statistics: Expert id -> additive statistics; id 0 is the public text.
        normalization: ``"rms"`` scales every token's state to unit root mean square first, as the owners did when
            they summed. It keeps the massive activations of the first position out of the running mean.
        temperature: Divides the logits.
        evidence: Exponent ``a`` of the number of positions ``t`` in the mean: logits are multiplied by ``t ** a``.
            0 takes the mean at face value; 1 treats positions as independent (naive Bayes); neighbours are neither.
    """

    depth: ClassVar[Literal["layer", "model"]] = "model"
    trainable = False
    Options: ClassVar[type[ScorerOptions]] = SolvedOptions

    def __init__(
        self,
        *,
        statistics: Mapping[int, Statistics],
        normalization: Literal["none", "rms"] = "rms",
        temperature: float = 1.0,
        evidence: float = 0.5,
    ) -> None:
        super().__init__()
        self.statistics = dict(statistics)
        self.normalization = normalization
        self.temperature = temperature
        self.evidence = evidence
        self._solved: Recent[tuple[torch.Tensor, torch.Tensor]] = Recent()

    @abstractmethod
    def solve(self, classes: Sequence[Statistics]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Solve the gate of a set of classes.

        Args:
            classes: Statistics in canonical order, the public ones first.

        Returns:
            Weights float64 ``(classes, d)`` and biases float64 ``(classes,)``.
        """

    @classmethod
    def problems(
        cls,
        *,
        public: RoutingInfo | None,
        experts: Mapping[str, tuple[RoutingInfo | None, Sequence[int]]],
        layer: int | None,
    ) -> list[str]:
        """All statistics must be of one layer and one normalization, at or below every expert layer."""
        if public is None or public.statistics is None:
            return [
                "the base publishes no public statistics, which are the class of text that is nobody's "
                "(see `coterie base public-routing --help`)"
            ]
        at, how = public.statistics.layer, public.statistics.normalization
        found = []
        if layer is not None and layer != at:
            found.append(f"router.layer is {layer}, but the statistics were taken at layer {at}")
        for name, (info, layers) in experts.items():
            own = None if info is None else info.statistics
            if own is None:
                found.append(f"{name} publishes no statistics (train it with `statistics: true`)")
            elif (own.layer, own.normalization) != (at, how):
                found.append(
                    f"{name} took its statistics at layer {own.layer} with normalization '{own.normalization}', "
                    f"the base at layer {at} with '{how}'"
                )
            if layers and min(layers) < at:
                found.append(f"{name} changes layer {min(layers)}, below layer {at}, where the gate decides")
        return found

    @classmethod
    def gate_layer(cls, *, public: RoutingInfo, layer: int | None) -> int | None:
        """Return the layer at which the public statistics were taken."""
        assert public.statistics is not None, "problems() was empty"
        return public.statistics.layer

    @classmethod
    def make(cls, inputs: ScorerInputs, options: Any) -> Self:
        """Collect the classes' statistics; gates are solved when a set of experts is first asked for."""
        assert inputs.public.info.statistics is not None, "problems() was empty"
        statistics = {}
        for expert, artifacts in {ANCHOR: inputs.public, **inputs.experts}.items():
            own = artifacts.statistics
            assert own is not None, "problems() was empty"
            statistics[expert] = own
        return cls(
            statistics=statistics,
            normalization=inputs.public.info.statistics.normalization,
            **options.model_dump(),
        )

    def features(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scale each state as the statistics were scaled; float32 ``(batch, positions, d)``."""
        states = hidden_states.float()
        if self.normalization == "none":
            return states
        return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-6)

    def discriminants(
        self, experts: Sequence[int], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gate of a set of experts, float64 ``(n, d)`` and ``(n,)``, solved on first use."""

        def solve() -> tuple[torch.Tensor, torch.Tensor]:
            weights, biases = self.solve([self.statistics[e] for e in experts])
            return torch.from_numpy(weights).to(device), torch.from_numpy(biases).to(device)

        return self._solved.get((tuple(experts), device), solve)

    def forward(
        self, features: torch.Tensor, counts: torch.Tensor | None, experts: Sequence[int]
    ) -> torch.Tensor:
        """Score by the discriminants of exactly these experts; see `Scorer.forward`."""
        if list(experts) == [ANCHOR]:
            return features.new_zeros(*features.shape[:-1], 1)
        weights, biases = self.discriminants(experts, features.device)
        # float64: a row's logits must not depend on how many rows of its group are scored beside it
        logits = (features.double() @ weights.T + biases).float() / self.temperature
        if self.evidence and counts is not None:
            logits = logits * counts.pow(self.evidence).unsqueeze(-1)
        return logits
