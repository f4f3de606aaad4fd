"""Low-rank experts on the query side of an embedding model, written as a plain PEFT adapter folder.

Reference: RouterRetriever (arXiv 2409.02685). Knows single linears and folders; knows nothing of pairs or losses.
"""

from __future__ import annotations

from typing import ClassVar, final

from pipelines.train.trainers.base import WriteContext
from pipelines.train.trainers.lora import LowRankTrainer

__all__ = ["RetrieverTrainer"]


@final
class RetrieverTrainer(LowRankTrainer):
    """Trains A and B of the chosen linears of an encoder's layers."""

    kind: ClassVar[str] = "retriever"
    default_learning_rate: ClassVar[float] = 1e-3

    def config(self, targets: list[str], *, context: WriteContext) -> dict[str, object]:
        """Return what is written for language models, with the task of embedding."""
        return {
            **super().config(targets, context=context),
            "lora_dropout": self.dropout,
            "task_type": "FEATURE_EXTRACTION",
        }
