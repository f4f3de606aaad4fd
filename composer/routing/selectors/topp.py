"""Top-p selection: the smallest set of experts that holds a share ``p`` of the probability, at most ``top_k`` of them.

Tokens that are surely of one domain meet one expert, doubtful ones meet several. The set is that of nucleus sampling
(Holtzman et al., arXiv 1904.09751, section 3.1), used for experts by Huang et al. (arXiv 2403.07652, section 3.2).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch.nn import functional as F

from composer.routing.selectors.base import Selector, SelectorOptions
from composer.routing.types import UNUSED

__all__ = ["TopP"]


class TopPOptions(SelectorOptions):
    """Settings of top-p selection; see `TopP`."""

    top_p: float = Field(default=0.9, gt=0, le=1)


class TopP(Selector):
    """Keep the most probable experts until they hold ``top_p`` of the probability.

    ``p = softmax(s)`` over the allowed experts, in descending order, ties to the lower id; expert ``j`` is kept if
    ``j < top_k`` and ``p_1 + ... + p_(j-1) < top_p``, so the first one always is.

    Args:
        top_k: Most experts per token; fewer where fewer are allowed.
        normalize: Whether the kept weights sum to 1. Needed on pre-norm bases, where the FFN's scale matters.
        top_p: Probability that the kept experts hold together, unless ``top_k`` stops them before.
    """

    Options = TopPOptions

    def __init__(self, *, top_k: int, normalize: bool = True, top_p: float = 0.9) -> None:
        super().__init__()
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}.")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}.")
        self.top_k = top_k
        self.normalize = normalize
        self.top_p = top_p
        self.adaptive = top_k > 1

    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Select experts by probability mass; see `Selector.forward`."""
        k = min(self.top_k, logits.shape[-1])
        ordered, order = torch.sort(logits.float(), dim=-1, descending=True, stable=True)
        shares = torch.softmax(ordered, dim=-1)
        before = F.pad(shares.cumsum(dim=-1)[:, : k - 1], (1, 0))  # it ascends: empty slots are the last ones
        empty = before >= self.top_p
        positions = order[:, :k].masked_fill(empty, UNUSED)
        if self.normalize:
            return positions, torch.softmax(ordered[:, :k].masked_fill(empty, float("-inf")), dim=-1)
        return positions, shares[:, :k].masked_fill(empty, 0.0)
