"""Top-k selection: softmax over the allowed experts, keep the k largest, optionally renormalise.

``p = softmax(s); v, i = top_k(p, min(k, n)); v /= sum(v)`` (FlexOlmo, arXiv 2507.07024, section 3; renormalised
as in Mixtral, arXiv 2401.04088). Ties go to the lower id, whatever the number of experts beside them.
"""

from __future__ import annotations

import torch

from composer.routing.selectors.base import Selector

__all__ = ["TopK"]


class TopK(Selector):
    """Keep the ``top_k`` most probable experts.

    Args:
        top_k: Experts per token; fewer where fewer are allowed.
        normalize: Whether the kept weights sum to 1. Needed on pre-norm bases, where the FFN's scale matters.
    """

    def __init__(self, *, top_k: int, normalize: bool = True) -> None:
        super().__init__()
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}.")
        self.top_k = top_k
        self.normalize = normalize

    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Select experts by probability; see `Selector.forward`."""
        k = min(self.top_k, logits.shape[-1])
        # topk gives ties to any of the tied columns; a stable sort gives them to the lower id
        ordered, order = torch.sort(logits.float(), dim=-1, descending=True, stable=True)
        # a softmax over the k largest logits is the renormalised softmax over all of them
        if self.normalize:
            return order[:, :k], torch.softmax(ordered[:, :k], dim=-1)
        return order[:, :k], torch.softmax(ordered, dim=-1)[:, :k]
