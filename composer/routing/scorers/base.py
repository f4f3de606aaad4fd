"""The scorer's contract: features in, one logit per allowed expert out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from experts.routing_artifacts import RoutingArtifacts, RoutingInfo

__all__ = ["Scorer", "ScorerInputs", "ScorerOptions"]


class ScorerOptions(BaseModel):
    """Settings of a scorer, as a manifest's ``router.options`` gives them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerInputs:
    """What a scorer is made from.

    Attributes:
        public: The anchor's routing artefacts, which nobody owns.
        experts: Expert id -> its routing artefacts.
        layer: Decoder layer that the scorer works for.
        dtype: Dtype of the model.
        device: Where the model is.
        hidden_size: Width d of what is scored.
        names: Expert id -> its name; the anchor's is `composer.trace.ANCHOR_NAME`. Ids that are not here have no row.
        branch: What is routed to: ``"ffn"`` or ``"attention"``.
    """

    public: RoutingArtifacts
    experts: Mapping[int, RoutingArtifacts]
    layer: int
    dtype: torch.dtype
    device: torch.device
    hidden_size: int = 0
    names: Mapping[int, str] = field(default_factory=dict)
    branch: Literal["ffn", "attention"] = "ffn"


class Scorer(nn.Module):
    """Turns hidden states into one logit per allowed expert.

    A scorer is exact under opt-out when its logits for a set of experts are those of a scorer that was made
    from that set alone. It gets the set *before* any arithmetic, so it slices or solves for it and never
    computes with a left-out owner's numbers.

    Attributes:
        depth: ``"layer"`` scores the input of every expert layer; ``"model"`` scores the hidden state that enters
            one decoder layer, and every expert layer above follows that decision.
        trainable: Whether the logits depend on parameters that a training loop may move.
        needs_artifacts: Whether it is made from what owners published.
        from_prompts: Whether it is made of the manifest's prompts, by running the composed model.
        Options: What ``router.options`` may say.
    """

    depth: ClassVar[Literal["layer", "model"]]
    trainable: ClassVar[bool]
    needs_artifacts: ClassVar[bool] = True
    from_prompts: ClassVar[bool] = False
    Options: ClassVar[type[ScorerOptions]] = ScorerOptions

    @classmethod
    @abstractmethod
    def problems(
        cls,
        *,
        public: RoutingInfo | None,
        experts: Mapping[str, tuple[RoutingInfo | None, Sequence[int]]],
        layer: int | None,
    ) -> list[str]:
        """Say what is missing or contradictory in the published artefacts; empty when the scorer can be made.

        Args:
            public: What the anchor publishes.
            experts: Expert name -> what it publishes and the layers it changes.
            layer: The manifest's ``router.layer``.
        """

    @classmethod
    def gate_layer(cls, *, public: RoutingInfo, layer: int | None) -> int | None:
        """Return the decoder layer whose input a model-wide scorer reads; None for per-layer scorers."""
        return None

    @classmethod
    @abstractmethod
    def make(cls, inputs: ScorerInputs, options: Any) -> Self:
        """Make a scorer from published artefacts; ``options`` is an instance of ``Options``."""

    def features(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map hidden states to what is averaged and scored; the identity unless overridden.

        Args:
            hidden_states: ``(batch, positions, d)``.
        """
        return hidden_states

    @abstractmethod
    def forward(
        self, features: torch.Tensor, counts: torch.Tensor | None, experts: Sequence[int]
    ) -> torch.Tensor:
        """Score the allowed experts.

        Args:
            features: ``(batch, positions, d)``, as the context returned them.
            counts: float32 ``(batch, positions)``, how many positions each feature is the mean of; None: of one.
            experts: Sorted ids of the allowed experts, the anchor (0) first.

        Returns:
            float32 or model dtype ``(batch, positions, len(experts))``.
        """

    def score_apart(
        self, features: torch.Tensor, counts: torch.Tensor | None, table: torch.Tensor
    ) -> torch.Tensor | None:
        """Score rows that differ in who is allowed, in one go.

        Only worth overriding where it is one product instead of one for each set; the logits must be those of
        `forward`, row by row.

        Args:
            features: ``(batch, positions, d)``.
            counts: As for `forward`.
            table: int64 ``(batch, n)``, each row's allowed experts, sorted; all rows allow equally many.

        Returns:
            ``(batch, positions, n)``, or None: `forward` is called for each set.
        """
        return None
