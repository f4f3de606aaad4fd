"""Low-rank FFN experts around the anchor's FFN: ``W_e = W + s_e B_e A_e`` on any of its linears.

FlexMoRE's form of a FlexOlmo expert (arXiv 2602.08818), stored as a plain PEFT adapter. The anchor's products
are computed once per token and shared by all experts, as in MixLoRA (arXiv 2404.15159); the down-projection is
linear, so the experts' hidden activations are mixed before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from composer.blocks.parts import FFNParts

__all__ = ["SEGMENT", "LowRankExpert", "LowRankFFN"]

SEGMENT = 16
"""Rows of an adapter's products are filled up to a multiple of this with zeros. The last bits of a product of few
rows depend on how many there are, and how many tokens meet an expert depends on what other requests allow."""


class LowRankExpert(nn.Module):
    """One owner's adapter on one FFN.

    Args:
        factors: Role -> (A ``(r, in)``, B ``(out, r)``, scaling). Roles that are missing keep the anchor's weight.
    """

    def __init__(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]]) -> None:
        super().__init__()
        self.lora_A = nn.ParameterDict({role: nn.Parameter(a) for role, (a, _, _) in factors.items()})
        self.lora_B = nn.ParameterDict({role: nn.Parameter(b) for role, (_, b, _) in factors.items()})
        self.scaling = {role: scaling for role, (_, _, scaling) in factors.items()}

    def delta(self, role: str, x: torch.Tensor) -> torch.Tensor | None:
        """Return ``s B A x`` for ``(tokens, in)``, or None where the expert leaves this linear alone."""
        if role not in self.scaling:
            return None
        rows = x.shape[0]
        x = F.pad(x, (0, 0, 0, -rows % SEGMENT))
        return F.linear(F.linear(x, self.lora_A[role]) * self.scaling[role], self.lora_B[role])[:rows]


class LowRankFFN(nn.Module):
    """The anchor's FFN with low-rank experts around it.

    Args:
        anchor: The base model's own FFN module.
        parts: Its linears by role.
        experts: Local index minus one -> adapter; local index 0 is the anchor.
        normalized: Whether the weights of every token sum to 1.
    """

    def __init__(
        self,
        *,
        anchor: nn.Module,
        parts: FFNParts,
        experts: Sequence[LowRankExpert],
        normalized: bool,
    ) -> None:
        super().__init__()
        self.anchor = anchor
        self.parts = parts
        self.experts = nn.ModuleList(experts)
        self.normalized = normalized

    def forward(
        self,
        x: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        *,
        has_unused: bool = False,
    ) -> torch.Tensor:
        """Mix the anchor and the chosen experts.

        Args:
            x: ``(tokens, d)``.
            indices: int64 ``(tokens, k)`` local indices; ones that are not of this block are skipped.
            weights: ``(tokens, k)``.
            has_unused: Accepted for symmetry; empty slots match no expert.

        Returns:
            ``(tokens, d)``: ``sum_e w_e FFN_e(x)`` over the anchor and this block's experts.
        """
        weights = weights.to(x.dtype)
        shared = self.parts.project(x)
        # absent experts point at the anchor too, so its weight is a sum
        anchor_weight = torch.where(indices == 0, weights, 0.0).sum(-1, keepdim=True)
        mixed = self.parts.hidden(shared) * anchor_weight
        delta: torch.Tensor | None = None
        for local, module in enumerate(self.experts, start=1):  # canonical order: sums are reproducible
            tokens, slots = torch.where(indices == local)
            if tokens.numel() == 0:
                continue
            expert: LowRankExpert = module  # type: ignore[assignment]
            hidden = self._hidden(expert, x, shared, tokens) * weights[tokens, slots, None]
            mixed = mixed.index_add(0, tokens, hidden)
            down = expert.delta("down", hidden)
            if down is not None:
                delta = x.new_zeros(x.shape) if delta is None else delta
                delta = delta.index_add(0, tokens, down)
        out = self._down(mixed, indices, weights)
        return out if delta is None else out + delta

    def _hidden(
        self,
        expert: LowRankExpert,
        x: torch.Tensor,
        shared: Mapping[str, torch.Tensor],
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        """Return one expert's hidden activation for the tokens that chose it."""
        everything = tokens.numel() == x.shape[0]
        x = x if everything else x[tokens]
        projected = {}
        for role, value in shared.items():
            own = value if everything else value[tokens]
            change = expert.delta(role, x)
            projected[role] = own if change is None else own + change
        return self.parts.hidden(projected)

    def _down(self, mixed: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        down = self.parts.down
        if down.bias is None or self.normalized:
            return down(mixed)  # type: ignore[no-any-return]
        own = (indices >= 0) & (indices <= len(self.experts))
        mass = torch.where(own, weights, 0.0).sum(-1, keepdim=True)
        return F.linear(mixed, down.weight) + mass * down.bias
