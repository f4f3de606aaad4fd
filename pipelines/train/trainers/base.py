"""What every trainer brings: a trainable stand-in for a linear, or a whole model set free, and how to write the expert.

Knows linears, models and folders; knows nothing of data or optimisers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

__all__ = ["ExpertTrainer", "ModelTrainer", "TrainableLinear", "Trainer", "WriteContext"]


class TrainableLinear(nn.Module, ABC):
    """A linear of the anchor with something trainable in it; the anchor's own tensors stay frozen."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``, in the dtype of ``x``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteContext:
    """What a trainer needs to know to write an expert folder that others can load."""

    base_name: str
    layers_prefix: str
    layers: Sequence[int]
    dtype: torch.dtype
    targets: Sequence[str] | None = None
    """Ends of the linears' names, where the last part alone would name others too."""


class Trainer(ABC):
    """How experts of one kind are made; either `ExpertTrainer` or `ModelTrainer`.

    Args:
        rank: Rank of low-rank experts; other kinds ignore it.
        alpha: Numerator of the low-rank scale ``alpha / rank``; other kinds ignore it.
    """

    kind: ClassVar[str]
    default_learning_rate: ClassVar[float]

    def __init__(self, *, rank: int, alpha: float) -> None:
        self.rank = rank
        self.alpha = alpha


class ExpertTrainer(Trainer):
    """Trains something beside, or in the place of, single linears of a frozen anchor."""

    @abstractmethod
    def wrap(self, linear: nn.Linear, *, generator: torch.Generator) -> TrainableLinear:
        """A trainable stand-in that at first computes exactly what ``linear`` computes."""

    @abstractmethod
    def write(self, folder: Path, linears: Mapping[str, TrainableLinear], *, context: WriteContext) -> None:
        """Write the expert's files into the existing, empty ``folder``.

        Args:
            folder: Receives the files of this kind and nothing else.
            linears: The trained linears by the full name of the module they stood in for
                (``model.layers.3.mlp.gate_proj``), in any order.
            context: Names and dtype for the files.
        """


class ModelTrainer(Trainer):
    """Trains the anchor's own tensors, all of them or some."""

    @abstractmethod
    def trainable(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters that are trained, in a fixed order; a tied one stands once."""

    @abstractmethod
    def write(self, folder: Path, model: nn.Module, *, anchor: Path, dtype: torch.dtype) -> None:
        """Write the expert's files into the existing, empty ``folder``.

        Args:
            folder: Receives the files of this kind and nothing else.
            model: Trained, with float32 parameters.
            anchor: The anchor's checkpoint folder.
            dtype: Of the tensors in the file.
        """
