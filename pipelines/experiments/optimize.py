"""A plain loop for weights that several owners' experts share: routers, or whole mixtures on pooled text.

Knows windows, parameters and a model's loss; knows nothing of owners. What it trains is not removable by opting
out, which is why only comparisons use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experts.errors import TrainingError

__all__ = ["language_model_loss", "optimize"]

Progress = Callable[[int, int, float], None]
"""Called with steps done, steps in all, and the loss."""


def language_model_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of windows ``(batch, length)`` int64, nats a token."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def optimize(
    model: nn.Module,
    ids: Tensor,
    *,
    parameters: Sequence[nn.Parameter],
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    cosine: bool = True,
    warmup: int = 10,
    progress: Progress | None = None,
) -> float:
    """Train parameters on windows with AdamW; return the mean loss of the last quarter of the steps.

    Args:
        model: A causal LM; left in eval mode.
        ids: int64 ``(windows, length)``; gone through in a fresh random order per epoch.
        parameters: What is trained.
        steps: Steps of the optimiser.
        batch_size: Windows in a step.
        learning_rate: Peak rate.
        seed: Decides the order.
        cosine: Fall to a tenth of the peak; otherwise constant after the warm-up.
        warmup: Steps of linear warm-up.
        progress: Told how far it is.

    Raises:
        TrainingError: The loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    order = torch.empty(0, dtype=torch.int64)
    losses: list[float] = []
    for parameter in parameters:
        parameter.requires_grad_(True)
    for step in range(steps):
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(ids), generator=generator)])
        chosen, order = order[:batch_size], order[batch_size:]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule(step, steps=steps, warmup=warmup, cosine=cosine)
        losses.append(_step(model, ids[chosen], optimizer, parameters))
        if not math.isfinite(losses[-1]):
            raise TrainingError(
                f"The loss is {losses[-1]} at step {step + 1} of {steps}. Lower learning_rate."
            )
        if progress is not None:
            progress(step + 1, steps, losses[-1])
    for parameter in parameters:
        parameter.requires_grad_(False)
    tail = losses[-max(1, steps // 4) :]
    return sum(tail) / len(tail)


def _step(model: nn.Module, ids: Tensor, optimizer: Any, parameters: Sequence[nn.Parameter]) -> float:
    loss = language_model_loss(model, ids)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _schedule(step: int, *, steps: int, warmup: int, cosine: bool) -> float:
    if step < warmup:
        return (step + 1) / warmup
    if not cosine:
        return 1.0
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
