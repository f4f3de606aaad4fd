"""Whole models: every tensor of the anchor is trained, as in Branch-Train-MiX and Branch-Attend-Mix.

References: arXiv 2403.07816, section 3.1; arXiv 2408.08274, section 3.1. Knows a model and its checkpoint; knows
nothing of data or losses.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import ClassVar, final

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experts.errors import TrainingError
from experts.files import capped
from experts.fingerprint import checkpoint_files
from experts.kinds.kind import DTYPES
from pipelines.train.trainers.base import ModelTrainer

__all__ = ["DenseTrainer"]


@final
class DenseTrainer(ModelTrainer):
    """Trains embeddings, attention, FFNs, norms and head; what the base ties stays tied."""

    kind: ClassVar[str] = "dense"
    default_learning_rate: ClassVar[float] = 5e-5

    def trainable(self, model: nn.Module) -> list[nn.Parameter]:
        """Every parameter, in the order of the model."""
        return list(model.parameters())

    def write(self, folder: Path, model: nn.Module, *, anchor: Path, dtype: torch.dtype) -> None:
        """``config.json`` of the anchor and ``model.safetensors`` with the anchor's own tensor names.

        What the anchor's file holds beside the model's parameters is written too: the copy of a tied embedding, or a
        stored buffer as it is there. The model is cast to ``dtype``.

        Raises:
            TrainingError: The anchor's checkpoint calls tensors otherwise than transformers does.
        """
        model.to(dtype)
        model.save_pretrained(folder, max_shard_size=1 << 50)  # type: ignore[operator]
        path = folder / "model.safetensors"
        wanted = {
            name: place
            for place, tensors in checkpoint_files(anchor).items()
            for name, tensor in tensors.items()
            if tensor.dtype in DTYPES
        }
        with safe_open(path, framework="pt") as file:
            written = set(file.keys())
        if foreign := sorted(written - set(wanted)):
            raise TrainingError(
                f"The base's checkpoint holds these tensors of {type(model).__name__} under other names, so a whole "
                "model cannot be written in its form. Train an expert of kind 'ffn' or 'lora':",
                problems=capped(foreign),
            )
        if lacking := set(wanted) - written:
            state = model.state_dict()
            more = {name: _tensor(name, state, wanted[name]).to(dtype, copy=True) for name in sorted(lacking)}
            save_file({**load_file(path), **more}, path, metadata={"format": "pt"})
        shutil.copyfile(anchor / "config.json", folder / "config.json")


def _tensor(name: str, state: dict[str, Tensor], path: Path) -> Tensor:
    if name in state:
        return state[name]
    with safe_open(path, framework="pt") as file:
        stored: Tensor = file.get_tensor(name)
    return stored
