"""Which positions a scorer looks at: the token alone, or the running mean up to it or up to the prompt's end.

A context is causal: position ``t`` sees positions ``<= t``. It turns per-token features into the features that
are scored, together with the number of positions behind each of them.
"""

from __future__ import annotations

from typing import Literal

import torch

from composer.routing.state import RouterState

__all__ = ["CONTEXTS", "ContextName", "prompt_mean", "running_mean", "token"]

ContextName = Literal["prompt_mean", "running_mean", "token"]
CONTEXTS: tuple[ContextName, ...] = ("prompt_mean", "running_mean", "token")


def token(features: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, None]:
    """Score every token by itself.

    Args:
        features: ``(batch, positions, d)``.

    Returns:
        The features as they came and None: each is of one position.
    """
    return features, None


def running_mean(
    features: torch.Tensor,
    *,
    layer: int,
    token_mask: torch.Tensor | None,
    state: RouterState | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the mean of all features up to and including each position.

    Padding is left out, and so is a row's first token once there is a second: decoders park attention on it, and
    its state says nothing about the text.

    Args:
        features: ``(batch, positions, d)``; summed in float32.
        layer: Key of the sums inside ``state``.
        token_mask: bool ``(batch, positions)`` or None.
        state: Continues from, and is advanced by, this call; None starts from nothing.

    Returns:
        Means, float32 ``(batch, positions, d)``, and counts, float32 ``(batch, positions)`` (at least 1).
    """
    values = features.float()
    if token_mask is None:
        ones = values.new_ones(values.shape[:2])
    else:
        ones = token_mask.to(values.dtype)
        # where, not a product: a padded position may hold anything
        values = torch.where(token_mask.unsqueeze(-1), values, 0.0)
    seen = ones.cumsum(dim=1)
    if state is not None and layer in state.seen:
        seen = seen + state.seen[layer].unsqueeze(1)
    later = seen > 1.0  # every position after the row's first token
    counted = torch.where(later.unsqueeze(-1), values, 0.0)
    sums = counted.cumsum(dim=1)
    if state is not None:
        if layer in state.sums:
            sums = sums + state.sums[layer].unsqueeze(1)
        state.sums[layer] = sums[:, -1].detach()
        state.seen[layer] = seen[:, -1].detach()
    counts = (seen - 1.0).clamp(min=1.0)
    return torch.where(later.unsqueeze(-1), sums / counts.unsqueeze(-1), values), counts


def prompt_mean(
    features: torch.Tensor,
    *,
    layer: int,
    token_mask: torch.Tensor | None,
    state: RouterState | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let the prompt decide about everything after it: the running mean stops at the prompt's last position.

    Inside the prompt it is the running mean itself, so that no position looks ahead. Where the prompt ends is not in
    the text: ``state.prompt_length`` says it, and nothing said means that all of it is prompt. A row's first two
    tokens always count, since the first one alone says nothing (see `running_mean`).

    Args:
        features: ``(batch, positions, d)``; summed in float32.
        layer: Key of the sums inside ``state``.
        token_mask: bool ``(batch, positions)`` or None.
        state: Continues from, and is advanced by, this call; None starts from nothing.

    Returns:
        Means, float32 ``(batch, positions, d)``, and counts, float32 ``(batch, positions)`` (at least 1).
    """
    if state is None:
        return running_mean(features, layer=layer, token_mask=token_mask, state=None)
    batch, length = features.shape[:2]
    start = state.columns.get(layer, 0)
    state.columns[layer] = start + length
    end = state.prompt_length
    if end is None or start + length <= end:
        return running_mean(features, layer=layer, token_mask=token_mask, state=state)
    real = features.new_ones((batch, length), dtype=torch.bool) if token_mask is None else token_mask
    rank = real.cumsum(dim=1, dtype=torch.float32)
    if layer in state.seen:
        rank = rank + state.seen[layer].unsqueeze(1)  # counts past 2 stand still, and never come back to it
    inside = torch.arange(start, start + length, device=features.device) < end
    return running_mean(features, layer=layer, token_mask=real & (inside | (rank <= 2.0)), state=state)
