"""Losses on a router's logits that keep training from wasting experts: load balancing and the router z-loss.

Knows logits and choices of one layer; knows nothing of models or of how the losses are weighed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from composer.routing.types import UNUSED

__all__ = ["load_balancing_loss", "router_z_loss", "tokens_per_expert"]


def tokens_per_expert(indices: Tensor, *, num_experts: int) -> Tensor:
    """Count how often each expert was chosen.

    Args:
        indices: int64 ``(tokens, k)`` ids; `UNUSED` where a slot is empty.
        num_experts: Size of the result, the anchor counted.

    Returns:
        float32 ``(num_experts,)``; a token counts once for each expert that it uses.
    """
    used = indices[indices != UNUSED]
    return torch.bincount(used, minlength=num_experts).float()


def load_balancing_loss(logits: Tensor, counts: Tensor) -> Tensor:
    """``N sum_i f_i P_i`` (Switch Transformer, arXiv 2101.03961, eq. 4-6), 1 where experts are used alike.

    ``P_i`` is the mean over these tokens of the softmax over all experts; ``f_i`` the share of the choices that fell on
    expert ``i``, a constant here. It may be counted on more tokens than these: on the whole batch of a step, over
    micro-batches and devices, which asks for balance over the batch and lets every micro-batch keep to its domain
    (arXiv 2501.11873, section 3). With k experts a token, ``f`` still sums to 1.

    Args:
        logits: ``(tokens, n)``; ``-inf`` where an expert is not to be had.
        counts: ``(n,)``, see `tokens_per_expert`.

    Returns:
        A scalar, float32. ``N`` counts the experts that are to be had.
    """
    there = torch.isfinite(logits).any(dim=0)
    probability = torch.softmax(logits.float(), dim=-1).mean(dim=0)
    share = counts / counts.sum().clamp(min=1)
    return there.sum() * (share.to(probability) * probability).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean squared log-partition ``mean_t (logsumexp_i z_ti)^2`` (ST-MoE, arXiv 2202.08906, eq. 5).

    Args:
        logits: ``(tokens, n)``; ``-inf`` where an expert is not to be had.

    Returns:
        A scalar, float32.
    """
    return logits.float().logsumexp(dim=-1).square().mean()
