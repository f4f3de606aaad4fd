"""Low-rank FFN experts, ``W_i = W + (alpha / rank) B A``, written as a plain PEFT adapter folder.

References: LoRA (arXiv 2106.09685); low-rank FFN experts over a shared anchor, FlexMoRE (arXiv 2602.08818).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.train.trainers.base import ExpertTrainer, TrainableLinear, WriteContext

__all__ = ["LowRankFFNTrainer", "LowRankLinear", "LowRankTrainer"]


@final
class LowRankLinear(TrainableLinear):
    """``y = W x + b + scale * B (A x)`` with W and b frozen.

    A and B are float32 whatever the anchor's dtype: AdamW steps of 1e-3 are lost in bfloat16. They are cast for
    the products.

    Args:
        linear: The anchor's linear; kept as it is.
        rank: r of A ``(r, in_features)`` and B ``(out_features, r)``.
        scale: Factor of the low-rank term.
        generator: Draws A as PEFT does (Kaiming uniform with a = sqrt 5); B starts at zero.
        dropout: On the input of the low-rank term, in training mode.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        rank: int,
        scale: float,
        generator: torch.Generator,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base = linear
        self.scale = scale
        self.dropout = dropout
        bound = 1 / math.sqrt(linear.in_features)
        start = torch.rand(rank, linear.in_features, generator=generator) * (2 * bound) - bound
        self.lora_a = nn.Parameter(start)
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        kept = F.dropout(x, self.dropout, self.training) if self.dropout else x
        low = F.linear(kept, self.lora_a.to(x.dtype))
        full: Tensor = self.base(x)
        return full + self.scale * F.linear(low, self.lora_b.to(x.dtype))


class LowRankTrainer(ExpertTrainer):
    """Trains A and B of the linears it is given, and writes them as PEFT does."""

    dropout: float = 0.0

    def wrap(self, linear: nn.Linear, *, generator: torch.Generator) -> TrainableLinear:
        """A low-rank stand-in; B = 0, so that it starts as the anchor."""
        scale = self.alpha / self.rank
        return LowRankLinear(linear, rank=self.rank, scale=scale, generator=generator, dropout=self.dropout)

    def write(self, folder: Path, linears: Mapping[str, TrainableLinear], *, context: WriteContext) -> None:
        """``adapter_config.json`` and ``adapter_model.safetensors`` that PEFT alone loads."""
        tensors = {}
        for name, linear in linears.items():
            assert isinstance(linear, LowRankLinear)
            tensors[f"base_model.model.{name}.lora_A.weight"] = linear.lora_a.detach().to(context.dtype)
            tensors[f"base_model.model.{name}.lora_B.weight"] = linear.lora_b.detach().to(context.dtype)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        targets = context.targets or {name.rpartition(".")[2] for name in linears}
        config = self.config(sorted(targets), context=context)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def config(self, targets: list[str], *, context: WriteContext) -> dict[str, object]:
        """Return PEFT's own fields; written here because a sorted file has the same bytes at every run."""
        return {
            "base_model_name_or_path": context.base_name,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "layers_pattern": context.layers_prefix.rpartition(".")[2],
            "layers_to_transform": list(context.layers),
            "lora_alpha": int(self.alpha) if float(self.alpha).is_integer() else self.alpha,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": self.rank,
            "target_modules": targets,
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        }


@final
class LowRankFFNTrainer(LowRankTrainer):
    """Trains A and B of every FFN linear of the declared layers."""

    kind: ClassVar[str] = "lora"
    default_learning_rate: ClassVar[float] = 2e-3
