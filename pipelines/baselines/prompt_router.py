"""Prompt-level routing: one expert for a whole window, chosen from the mean anchor state of its first tokens.

The classifier is solved from the statistics that owners and the public text publish, so no text is shared and an
owner who is not listed leaves no trace. Knows whole models; knows nothing of mixing inside a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from experts.errors import ManifestError, PlanError
from experts.routing_artifacts import RoutingArtifacts
from pipelines.baselines.arm import Arm
from pipelines.baselines.dense import open_dense

if TYPE_CHECKING:
    from composer.routing.scorers.base import Scorer
    from pipelines.baselines.anchor import Anchor
    from pipelines.baselines.context import BaselineContext

__all__ = ["ANCHOR", "PromptClassifier", "PromptRouter", "make"]

ANCHOR = "anchor"
"""What the classifier says of text that is nobody's."""


@final
class PromptClassifier:
    """Says whose domain a prompt is of.

    Args:
        anchor: Gives the states.
        scorer: A model-wide scorer; its expert 0 is public text, the others ``domains`` in order.
        layer: The states that enter this layer are averaged.
        domains: The experts' domains.
        prompt_tokens: How many tokens are read.
        threshold: A domain whose posterior is below it is not believed.
    """

    def __init__(
        self,
        anchor: Anchor,
        scorer: Scorer,
        *,
        layer: int,
        domains: tuple[str, ...],
        prompt_tokens: int,
        threshold: float = 0.0,
    ) -> None:
        self.anchor = anchor
        self.scorer = scorer
        self.layer = layer
        self.domains = domains
        self.prompt_tokens = prompt_tokens
        self.threshold = threshold

    def posteriors(self, ids: Tensor) -> Tensor:
        """How likely each class is.

        Args:
            ids: int64 ``(batch, length)``; what follows the prompt is not looked at.

        Returns:
            float32 ``(batch, 1 + domains)``, the anchor's class first; rows sum to 1.
        """
        with torch.inference_mode():
            states = self.anchor.states(ids[:, : self.prompt_tokens], self.layer)
            mean = self.scorer.features(states).mean(dim=1, keepdim=True)
            counts = mean.new_full(mean.shape[:2], states.shape[1])
            scores = self.scorer(mean, counts, tuple(range(len(self.domains) + 1)))
            return torch.softmax(scores.float(), dim=-1)[:, 0]

    def choose(self, ids: Tensor) -> list[str]:
        """The likeliest domain of each prompt, or ``anchor``."""
        best = self.posteriors(ids).max(dim=-1)
        names = (ANCHOR, *self.domains)
        return [
            names[index] if value >= self.threshold else ANCHOR
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


@final
class PromptRouter(Arm):
    """Each window with the expert chosen for its prompt.

    Args:
        anchor: Runs the models, and answers where no expert is chosen.
        experts: Domain -> its tensors.
        classifier: Chooses.
        peek: Whether the expert predicts the prompt itself, too. It was chosen with the prompt in view, so this
            flatters the router; without it the anchor predicts the prompt's tokens.
    """

    def __init__(
        self,
        anchor: Anchor,
        experts: Mapping[str, Mapping[str, Tensor]],
        *,
        classifier: PromptClassifier,
        peek: bool,
    ) -> None:
        self.anchor = anchor
        self.experts = experts
        self.classifier = classifier
        self.peek = peek

    def logits(self, ids: Tensor, *, domain: str | None = None) -> Tensor:
        """See `Arm.logits`; in the anchor's dtype."""
        with torch.inference_mode():
            choices = self.classifier.choose(ids)
            alone = None if self.peek else self.anchor.logits(ids)
            rows: list[Tensor | None] = [None] * len(ids)
            for chosen in dict.fromkeys(choices):
                at = [row for row, choice in enumerate(choices) if choice == chosen]
                if chosen == ANCHOR and alone is not None:
                    predicted = alone[at]
                else:
                    predicted = self.anchor.logits(ids, self.experts.get(chosen), rows=at)
                for row, logits in zip(at, predicted, strict=True):
                    rows[row] = logits if alone is None else self._after_prompt(alone[row], logits)
            return torch.stack([row for row in rows if row is not None])

    def _after_prompt(self, before: Tensor, after: Tensor) -> Tensor:
        """The anchor until the prompt's last token is read, the chosen expert from there on."""
        read = self.classifier.prompt_tokens - 1
        return torch.cat([before[:read], after[read:]])


def make(
    context: BaselineContext,
    *,
    prompt_tokens: int = 32,
    threshold: float = 0.0,
    peek: bool = False,
    scorer: str = "lda",
    scorer_options: Mapping[str, Any] | None = None,
) -> PromptRouter:
    """Make the router over all experts.

    Args:
        context: Anchor and experts, all of which publish statistics.
        prompt_tokens: How many tokens the classifier reads; at least 1. A shorter window is all prompt.
        threshold: Posterior below which the anchor answers; from 0 to 1.
        peek: See `PromptRouter`.
        scorer: A model-wide scorer that is solved from statistics: ``lda``, ...
        scorer_options: The scorer's own, as a manifest's ``router.options``.

    Raises:
        ManifestError: A value is not allowed.
        UnknownNameError: There is no such scorer.
        PlanError: Statistics are missing, or were taken in different ways.
    """
    if prompt_tokens < 1:
        raise ManifestError(f"prompt_tokens: {prompt_tokens} found; it must be at least 1.")
    if not 0 <= threshold <= 1:
        raise ManifestError(f"threshold: {threshold} found; it must lie from 0 to 1.")
    anchor = context.anchor()
    made, layer = _make_scorer(context, anchor, scorer, scorer_options or {})
    classifier = PromptClassifier(
        anchor,
        made,
        layer=layer,
        domains=context.domains,
        prompt_tokens=prompt_tokens,
        threshold=threshold,
    )
    experts = {domain: dict(tensors) for domain, tensors in open_dense(context).items()}
    return PromptRouter(anchor, experts, classifier=classifier, peek=peek)


def _make_scorer(
    context: BaselineContext, anchor: Anchor, name: str, options: Mapping[str, Any]
) -> tuple[Scorer, int]:
    """Make the scorer from what is published, and say which layer's input it reads."""
    from composer.routing.scorers import SCORERS
    from composer.routing.scorers.base import ScorerInputs
    from experts.strict import validate

    kind = SCORERS.load(name)
    if kind.depth != "model":
        raise ManifestError(
            f"scorer: '{name}' scores every layer by itself. A prompt router needs one that decides once, such as lda."
        )
    chosen = validate(kind.Options, dict(options), what=f"options of scorer '{name}'", error=ManifestError)
    base, members = context.registry.base(context.base), context.members()
    # the layers that experts change do not matter: the states are the frozen anchor's
    published = {member.card.name: (member.card.routing, ()) for member in members.values()}
    problems = kind.problems(public=base.routing, experts=published, layer=None)
    if problems:
        raise PlanError("A prompt router cannot be made:", problems=problems)
    assert base.routing is not None, "problems() was empty"
    assert base.routing_sha256 is not None, "it is there with base.routing"
    width = anchor.description.hidden_size
    public = RoutingArtifacts.load(
        context.registry.blob_path(base.routing_sha256), base.routing, hidden_size=width
    )
    layer = kind.gate_layer(public=base.routing, layer=None)
    experts = {}
    for number, member in enumerate(members.values(), start=1):
        info = member.card.routing
        assert info is not None, "problems() was empty"
        experts[number] = RoutingArtifacts.load(member.files[info.file], info, hidden_size=width)
    inputs = ScorerInputs(
        public=public, experts=experts, layer=layer, dtype=anchor.dtype, device=anchor.device
    )
    return kind.make(inputs, chosen), layer
