"""Router rows as mergekit-moe makes them: from prompts through the base model, from embeddings, or by chance.

One vector an expert and layer. Knows embeddings and hidden states; knows nothing of where the rows are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from composer.mergekit_moe.manifest import PROMPTED, MoEExpert
from composer.mergekit_moe.matrices import read_rows
from composer.mergekit_moe.tokens import Batch, read_prompts, read_tokenizer

if TYPE_CHECKING:
    from composer.mergekit_moe.planning import MoEPlan
    from composer.mergekit_moe.sources import SourceModel

__all__ = ["DEGENERATE", "Gates", "make_gates"]

DEGENERATE = 5.0
"""Condition number of a layer's rows above which experts are hard to tell apart; mergekit's threshold."""

_SMALLEST = 1e-8
"""Norms below it count as this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """Router rows.

    Attributes:
        rows: ``(layers, experts, d)``, after the routed experts' the shared one's, where there is one.
        experts: Number of routed experts.
        warnings: What the rows give reason to warn of.
    """

    rows: Tensor
    experts: int
    warnings: tuple[str, ...]

    def routed(self, layer: int) -> Tensor:
        """Return the rows of the routed experts, ``(experts, d)``."""
        return self.rows[layer, : self.experts]

    def shared(self, layer: int) -> Tensor:
        """Return the row of the shared expert, ``(1, d)``."""
        return self.rows[layer, self.experts :]


def make_gates(plan: MoEPlan) -> Gates:
    """Make the rows that a plan asks for.

    Raises:
        AdmissionError: The base's tokenizer cannot be read.
        DataError: It makes no usable tokens of a prompt.
    """
    manifest = plan.manifest
    shared = [] if manifest.shared is None else [manifest.shared]
    if manifest.gate_mode in PROMPTED:
        rows = _asked(plan, [*manifest.experts, *(shared if plan.gated else [])])
    else:  # one for the shared expert even where nothing reads it: the rows drawn after it depend on that
        rows = _drawn(plan, len(manifest.experts) + len(shared))
    read = rows[:, : len(manifest.experts) + plan.gated]
    return Gates(rows=rows, experts=len(manifest.experts), warnings=tuple(_warnings(read)))


def _drawn(plan: MoEPlan, count: int) -> Tensor:
    """Draw normal rows, or uniform ones within ``1 / sqrt(d)`` as a linear is initialised."""
    description = plan.base.description
    shape = (description.num_layers, count, description.hidden_size)
    generator = torch.Generator().manual_seed(plan.seed)
    if plan.manifest.gate_mode == "random":
        return torch.randn(shape, generator=generator)
    scale = math.sqrt(1.0 / description.hidden_size)
    return torch.rand(shape, generator=generator) * 2 * scale - scale


def _asked(plan: MoEPlan, experts: Sequence[MoEExpert]) -> Tensor:
    """Return ``normalise(mean over positive prompts - mean over negative prompts)`` for each expert."""
    tokenizer = read_tokenizer(plan.base)
    questions: list[tuple[int, int, Batch]] = []
    for number, expert in enumerate(experts):
        for sign, prompts in ((1, expert.positive_prompts), (-1, expert.negative_prompts)):
            if prompts:
                batch = read_prompts(tokenizer, prompts, vocabulary=plan.base.vocabulary)
                questions.append((number, sign, batch))
    answers = _summaries(plan)([batch for _, _, batch in questions])
    vectors: dict[int, Tensor] = {}
    for (number, sign, _), answer in zip(questions, answers, strict=True):
        vectors[number] = answer if sign > 0 else vectors[number] - answer
    rows = [_normalised(vectors[number]) for number in range(len(experts))]
    return torch.stack(rows, dim=1)


def _normalised(rows: Tensor) -> Tensor:
    norms: Tensor = rows.norm(p=2, dim=-1, keepdim=True)
    return rows / norms.clamp(min=_SMALLEST)


def _summaries(plan: MoEPlan) -> Callable[[Sequence[Batch]], list[Tensor]]:
    """Return what makes one vector a layer of each batch of prompts: ``(layers, d)``."""
    if plan.manifest.gate_mode == "cheap_embed":
        layers = plan.base.description.num_layers
        return lambda batches: [_embedded(plan.base, batch).repeat(layers, 1) for batch in batches]
    average = plan.manifest.gate_mode == "hidden_avg"

    def through_the_base(batches: Sequence[Batch]) -> list[Tensor]:
        from composer.mergekit_moe.streamed import StreamedDecoder

        def reduce(states: Tensor) -> Tensor:
            # padding counts in the mean, as it does in mergekit's
            one = states.sum(dim=1) / states.shape[1] if average else states[:, -1, :]
            return one.sum(dim=0) / one.shape[0]

        kept = StreamedDecoder(plan.base).entering(batches, reduce)
        return [torch.stack(layers) for layers in kept]

    return through_the_base


def _embedded(base: SourceModel, batch: Batch) -> Tensor:
    """Return the direction of the sum of the prompts' token embeddings, ``(1, d)``."""
    stored = next(found for name, found in base.tensors.items() if name.endswith("embed_tokens.weight"))
    ids = batch["input_ids"]
    table = {
        int(token): read_rows(stored, int(token), int(token) + 1)[0].float()
        for token in set(ids.flatten().tolist())
    }
    states = torch.stack([torch.stack([table[int(token)] for token in row]) for row in ids])
    summed = (states * batch["attention_mask"].unsqueeze(-1)).sum(dim=1).sum(dim=0, keepdim=True)
    return _normalised(summed)


def _warnings(rows: Tensor) -> list[str]:
    if rows.shape[1] < 2:
        return []
    conditions = torch.linalg.cond(rows.float())
    bad = [layer for layer, value in enumerate(conditions.tolist()) if not value <= DEGENERATE]
    if not bad:
        return []
    return [
        f"layers {', '.join(map(str, bad))}: the experts' router rows are nearly alike (condition number "
        f"{max(conditions.tolist()):.3g}, above {DEGENERATE:g}), so some experts will be used little; give them "
        "prompts that differ more."
    ]
