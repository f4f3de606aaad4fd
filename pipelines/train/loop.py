"""The training loop: AdamW over a fixed plan of batches, checkpointed, resumable to the bit.

Knows parameters, a loss and a schedule; knows nothing of models, data or owners.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experts.errors import TrainingError
from pipelines.train.checkpoint import TrainingState, load_checkpoint, save_checkpoint

__all__ = [
    "Accumulate",
    "LoopResult",
    "LoopSettings",
    "alike",
    "learning_rate_at",
    "one_pass",
    "plan_batches",
    "train",
]

Accumulate = Callable[[Tensor], float]
"""Puts the gradients of the windows with the given numbers ``(batch,)`` int64 into the parameters; returns the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """Numbers of the loop, as in the job."""

    steps: int
    learning_rate: float
    weight_decay: float
    warmup: int
    grad_clip: float
    checkpoint_every: int
    schedule: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopResult:
    """How it went: the mean loss of the job's last quarter of steps, and where this run resumed."""

    loss: float
    seconds: float
    resumed_from: int
    state: TrainingState


def plan_batches(
    *, steps: int, batch_size: int, own: int, public: int, public_fraction: float, seed: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Which windows each step trains on: ``(steps, batch_size)`` int64.

    Own windows are numbered from 0, public ones from ``own``. Each kind is gone through in a fresh random order
    per epoch. The plan is a function of its arguments alone, so a resumed job follows the same one.
    """
    rng = np.random.default_rng(seed)
    plan = np.empty((steps, batch_size), dtype=np.int64)
    is_public = (
        rng.random((steps, batch_size)) < public_fraction if public else np.zeros(plan.shape, dtype=bool)
    )
    for mask, count, offset in ((~is_public, own, 0), (is_public, public, own)):
        total = int(mask.sum())
        epochs = [rng.permutation(count) for _ in range(math.ceil(total / count))] if total else []
        plan[mask] = offset + (np.concatenate(epochs)[:total] if epochs else np.empty(0, dtype=np.int64))
    return plan


def alike(
    plan: np.ndarray[Any, np.dtype[np.int64]],
    lengths: np.ndarray[Any, np.dtype[np.int64]],
    *,
    seed: int,
    together: int = 8,
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Exchange windows between steps that are near each other, so that those of a step are of about the same length.

    Args:
        plan: ``(steps, batch)``.
        lengths: Of every window.
        seed: Decides the order of the steps that were sorted.
        together: Steps that exchange windows.

    Returns:
        A plan with the same windows in every ``together`` steps.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for start in range(0, len(plan), together):
        part = plan[start : start + together]
        flat = part.ravel()
        by_length = flat[np.argsort(lengths[flat], kind="stable")].reshape(part.shape)
        parts.append(by_length[rng.permutation(len(part))])
    return np.concatenate(parts)


def learning_rate_at(step: int, settings: LoopSettings) -> float:
    """Linear warm-up, then constant, a cosine to a tenth, or a straight line to nothing."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    if settings.schedule == "linear":
        return settings.learning_rate * (1 - done)
    return settings.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def one_pass(loss_of: Callable[[Tensor], Tensor]) -> Accumulate:
    """Take the gradients of a scalar loss in one backward pass."""

    def accumulate(windows: Tensor) -> float:
        loss = loss_of(windows)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    return accumulate


def train(
    *,
    parameters: Sequence[nn.Parameter],
    undecayed: Sequence[nn.Parameter],
    accumulate: Accumulate,
    plan: np.ndarray[Any, np.dtype[np.int64]],
    settings: LoopSettings,
    checkpoint: Path | None,
    on_step: Callable[[int, float, float], None],
    keeps_checkpoints: bool = True,
) -> LoopResult:
    """Run the steps that are left.

    Args:
        parameters: Trained with the settings' weight decay.
        undecayed: Trained without (router rows and biases).
        accumulate: See `Accumulate`.
        plan: ``(steps, batch)``, see `plan_batches`.
        settings: The numbers.
        checkpoint: Written every ``checkpoint_every`` steps and on interruption; continued from if it exists. None:
            nothing is kept.
        on_step: Called with steps done, loss and seconds so far.
        keeps_checkpoints: Whether this process writes them; of several that train together, one does.

    Raises:
        TrainingError: The loss is not finite.
        KeyboardInterrupt: Passed on, after a checkpoint.
    """
    everything = [*parameters, *undecayed]
    groups = [
        {"params": list(parameters), "weight_decay": settings.weight_decay},
        {"params": list(undecayed), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=settings.learning_rate, betas=(0.9, 0.95)
    )
    state = TrainingState(step=0, seconds=0.0)
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, parameters=everything, optimizer=optimizer) or state
    resumed, begin = state.step, time.perf_counter() - state.seconds
    quarter = max(1, settings.steps // 4)
    whole = True  # False while parameters stand between two steps

    def store() -> None:
        if checkpoint is not None and keeps_checkpoints:
            save_checkpoint(checkpoint, parameters=everything, optimizer=optimizer, state=state)

    try:
        for step in range(state.step, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, settings)
            loss = _gradients(accumulate, plan[step], everything, step=step, settings=settings)
            whole = False
            optimizer.step()
            state = replace(
                state,
                step=step + 1,
                seconds=time.perf_counter() - begin,
                losses=(*state.losses, loss)[-quarter:],
            )
            whole = True
            optimizer.zero_grad(set_to_none=True)
            if state.step % settings.checkpoint_every == 0 and state.step < settings.steps:
                store()
            on_step(state.step, loss, state.seconds)
    except KeyboardInterrupt:
        if whole and state.step > resumed:
            store()
        raise
    return LoopResult(
        loss=float(np.mean(state.losses)),
        seconds=state.seconds,
        resumed_from=resumed,
        state=state,
    )


def _gradients(
    accumulate: Accumulate,
    windows: np.ndarray[Any, np.dtype[np.int64]],
    parameters: Sequence[nn.Parameter],
    *,
    step: int,
    settings: LoopSettings,
) -> float:
    """Put the clipped gradients of one batch into the parameters; return the loss."""
    value = accumulate(torch.from_numpy(windows))
    if not math.isfinite(value):
        raise TrainingError(
            f"The loss is {value} at step {step + 1} of {settings.steps}. "
            "Lower learning_rate, lengthen warmup or check the data."
        )
    if settings.grad_clip > 0:
        torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
    return value
