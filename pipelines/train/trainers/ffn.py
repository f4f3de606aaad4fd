"""Full FFN experts: the matrices themselves, as in FlexOlmo (arXiv 2507.07024)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.train.trainers.base import ExpertTrainer, TrainableLinear, WriteContext

__all__ = ["FullFFNTrainer", "FullLinear"]


@final
class FullLinear(TrainableLinear):
    """A trainable copy of a linear; the copy is float32 and cast for the product, the original stays frozen."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().to(torch.float32, copy=True))
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(torch.float32, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


@final
class FullFFNTrainer(ExpertTrainer):
    """Trains every matrix (and bias) of the FFNs of the declared layers, starting from the anchor's."""

    kind: ClassVar[str] = "ffn"
    default_learning_rate: ClassVar[float] = 1e-4

    def wrap(self, linear: nn.Linear, *, generator: torch.Generator) -> TrainableLinear:
        """A trainable copy of ``linear``; nothing is drawn."""
        return FullLinear(linear)

    def write(self, folder: Path, linears: Mapping[str, TrainableLinear], *, context: WriteContext) -> None:
        """``config.json`` and ``ffn.safetensors`` with the anchor's own tensor names."""
        tensors = {}
        for name, linear in linears.items():
            assert isinstance(linear, FullLinear)
            tensors[f"{name}.weight"] = linear.weight.detach().to(context.dtype)
            if linear.bias is not None:
                tensors[f"{name}.bias"] = linear.bias.detach().to(context.dtype)
        save_file(tensors, folder / "ffn.safetensors", metadata={"format": "pt"})
        config = {"format_version": 1, "layers": list(context.layers)}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
