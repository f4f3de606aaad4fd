"""The mix of a tuning job: windows of every source, and which of them each step trains on.

Knows texts, tokenizers and shares; knows nothing of models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.train.windows import make_windows, read_documents

if TYPE_CHECKING:
    from pipelines.tune.job import TuneJob

__all__ = ["Mix", "plan_mix", "read_mix"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Windows of all sources, one source after the other.

    Attributes:
        ids: int32 ``(windows, sequence_length)``.
        counts: Windows of each source.
        plan: int64 ``(steps, batch_size)``: the windows of every step.
    """

    ids: NDArray[np.int32]
    counts: tuple[int, ...]
    plan: NDArray[np.int64]

    def digest(self) -> str:
        """sha256 of the windows and their order, to recognise the same text when a job resumes."""
        return hashlib.sha256(self.ids.tobytes() + self.plan.tobytes()).hexdigest()


def read_mix(job: TuneJob, tokenizer: Any) -> Mix:
    """Read and tokenise as much of every source as the job needs.

    Raises:
        DataError: Text is missing, malformed or too short.
    """
    weights = [source.weight for source in job.data]
    needed = np.bincount(_sources(job.steps * job.batch_size, weights), minlength=len(weights))
    parts = []
    for source, count in zip(job.data, needed, strict=True):
        windows = make_windows(
            read_documents(source.text),
            tokenizer,
            sequence_length=job.sequence_length,
            limit=max(1, int(count)),
            seed=job.seed,
            what=f"the text of {source.owner}" if source.owner else "the public text",
        )
        parts.append(windows.ids)
    counts = tuple(len(part) for part in parts)
    plan = plan_mix(steps=job.steps, batch_size=job.batch_size, counts=counts, weights=weights, seed=job.seed)
    return Mix(ids=np.concatenate(parts), counts=counts, plan=plan)


def plan_mix(
    *, steps: int, batch_size: int, counts: Sequence[int], weights: Sequence[float], seed: int
) -> NDArray[np.int64]:
    """Say which windows each step trains on: ``(steps, batch_size)`` int64.

    At any moment every source has had its share to within a window or so, and each is gone through in a fresh random
    order per epoch. The plan is a function of its arguments alone, so a resumed job follows the same one.

    Args:
        steps: Steps of the optimiser.
        batch_size: Windows in a step.
        counts: Windows of each source, which are numbered source after source.
        weights: Share of each source, in any unit.
        seed: Decides the order.
    """
    rng = np.random.default_rng(seed)
    sources = _sources(steps * batch_size, weights)
    plan = np.empty(len(sources), dtype=np.int64)
    first = 0
    for source, count in enumerate(counts):
        mine = sources == source
        total = int(mine.sum())
        epochs = [rng.permutation(count) for _ in range(-(-total // count))]
        plan[mine] = first + (np.concatenate(epochs)[:total] if epochs else np.empty(0, dtype=np.int64))
        first += count
    return plan.reshape(steps, batch_size)


def _sources(draws: int, weights: Sequence[float]) -> NDArray[np.int64]:
    """Deal draws out to the sources: each goes to the one that is furthest behind its share."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    dealt = np.zeros(len(shares))
    sources = np.empty(draws, dtype=np.int64)
    for draw in range(draws):
        sources[draw] = np.argmax(shares * (draw + 1) - dealt)
        dealt[sources[draw]] += 1
    return sources
