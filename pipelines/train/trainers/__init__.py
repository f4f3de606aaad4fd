"""The table of trainers: how an expert of each kind is made of the anchor, trained and written.

Knows names and import paths; the trainers themselves are imported on demand, torch with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from experts.plugins import PluginTable

if TYPE_CHECKING:
    from pipelines.train.trainers.base import Trainer

__all__ = ["TRAINERS", "get_trainer"]

TRAINERS = PluginTable(
    "trainer",
    {
        "dense": "pipelines.train.trainers.dense:DenseTrainer",
        "ffn": "pipelines.train.trainers.ffn:FullFFNTrainer",
        "lora": "pipelines.train.trainers.lora:LowRankFFNTrainer",
        "retriever": "pipelines.train.trainers.retriever:RetrieverTrainer",
    },
)
"""Trainers by the kind of expert they write; third parties add rows through the group ``coterie.trainers``."""


def get_trainer(kind: str) -> type[Trainer]:
    """Import the trainer of experts of this kind.

    Raises:
        UnknownNameError: There is none.
    """
    trainer: type[Trainer] = TRAINERS.load(kind)
    return trainer
