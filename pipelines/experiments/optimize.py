"""A plain loop for weights that several owners' experts share: routers, or whole mixtures on pooled text.

Knows windows, parameters and a model's loss; knows nothing of owners. What it trains is not removable by opting
out, which is why only comparisons use it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.train.loop import LoopSettings, one_pass, train
from pipelines.tune.objective import language_model_loss

__all__ = ["optimize"]

Progress = Callable[[int, int, float], None]
"""Called with steps done, steps in all, and the loss."""


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
        model: A causal LM, on any device; left in eval mode.
        ids: int64 ``(windows, length)``, on any device; gone through in a fresh random order per epoch.
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
    for parameter in parameters:
        parameter.requires_grad_(True)
    ids = ids.to(next(model.parameters()).device)
    result = train(
        parameters=parameters,
        undecayed=[],
        accumulate=one_pass(lambda windows: language_model_loss(model, ids[windows])),
        plan=_plan(len(ids), steps=steps, batch_size=batch_size, seed=seed),
        settings=LoopSettings(
            steps=steps,
            learning_rate=learning_rate,
            weight_decay=0.0,
            warmup=warmup,
            grad_clip=1.0,
            checkpoint_every=steps,
            schedule="cosine" if cosine else "constant",
        ),
        checkpoint=None,
        on_step=lambda done, loss, _: None if progress is None else progress(done, steps, loss),
    )
    for parameter in parameters:
        parameter.requires_grad_(False)
    return result.loss


def _plan(
    windows: int, *, steps: int, batch_size: int, seed: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Go through the windows in a fresh random order per epoch; what is left of one goes before the next."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    plan = torch.empty(steps, batch_size, dtype=torch.int64)
    for step in range(steps):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(windows, generator=generator)])
        plan[step], order = order[:batch_size], order[batch_size:]
    return plan.numpy()
