"""The two forms a retriever is trained in: low-rank matrices beside linears, or an encoder's layers themselves.

Knows which modules of an encoder are trained and how each form is written; knows nothing of pairs, losses or steps.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from experts.errors import TrainingError
from experts.files import capped
from experts.fingerprint import WEIGHTS, checkpoint_files
from experts.kinds.kind import DTYPES
from experts.names import unknown_name
from experts.tokens import TOKENIZER_CONFIG, TOKENIZER_FILE
from pipelines.train.anchor import ResolvedBase
from pipelines.train.job import DomainJob
from pipelines.train.query_encoder import RetrievalBase
from pipelines.train.trainers.base import TrainableLinear, WriteContext
from pipelines.train.trainers.retriever import RetrieverTrainer

__all__ = ["TrainedForm", "make_form"]

_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DEFAULT_TARGETS = ("query", "value", "intermediate.dense", "attn.q", "attn.v")
"""Query, value and the FFN's first linear, as BERT's and MPNet's families call them."""


class TrainedForm(ABC):
    """What of a query encoder is trained, and how it is published.

    Args:
        job: Of kind ``retriever``.
        base: The embedding model.
    """

    def __init__(self, job: DomainJob, base: ResolvedBase) -> None:
        assert job.retrieval is not None
        self.job = job
        self.settings = job.retrieval
        self.base = base
        self.layers = job.layer_numbers(base.description.num_layers)
        self.dtype = _TORCH_DTYPES[base.description.dtype]

    @abstractmethod
    def attach(self, model: RetrievalBase) -> Sequence[nn.Module]:
        """Put what is trained into the encoder; return the modules whose trainable parameters are the expert.

        Until the first step the encoder computes what it computed before.
        """

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the expert's files into the existing, empty ``folder``.

        Raises:
            TrainingError: The base's files do not allow this form.
        """


@final
class AdapterForm(TrainedForm):
    """LoRA on the chosen linears, as in RouterRetriever (arXiv 2409.02685)."""

    def __init__(self, job: DomainJob, base: ResolvedBase) -> None:
        super().__init__(job, base)
        self._trainer = RetrieverTrainer(rank=job.rank, alpha=job.alpha or float(job.rank))
        self._trainer.dropout = self.settings.dropout
        self._targets = self._chosen_targets()
        self._linears: dict[str, TrainableLinear] = {}

    def _chosen_targets(self) -> dict[str, list[str]]:
        """Each target to the linears of the job's layers that it names."""
        description = self.base.description
        linears = [name for name in description.layer_linears() if description.layer_of(name) in self.layers]
        wanted = self.settings.targets or _DEFAULT_TARGETS
        found = {target: [name for name in linears if name.endswith(f".{target}")] for target in wanted}
        missing = [target for target, names in found.items() if not names]
        if missing and (self.settings.targets or len(missing) == len(found)):
            prefix = f"{description.layers_prefix}.{self.layers[0]}."
            known = [name.removeprefix(prefix) for name in linears if name.startswith(prefix)]
            raise unknown_name("target", missing[0], known)
        return {target: names for target, names in found.items() if names}

    def attach(self, model: RetrievalBase) -> Sequence[nn.Module]:
        """Put a trainable linear in the place of each that is adapted."""
        generator = torch.Generator().manual_seed(self.job.seed)
        for name in sorted({name for names in self._targets.values() for name in names}):
            linear = model.encoder.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            self._linears[name] = self._trainer.wrap(linear, generator=generator)
            model.encoder.set_submodule(name, self._linears[name])
        return list(self._linears.values())

    def write(self, folder: Path) -> None:
        """Write a plain PEFT adapter folder."""
        context = WriteContext(
            base_name=self.base.ref.name,
            layers_prefix=self.base.description.layers_prefix,
            layers=self.layers,
            dtype=self.dtype,
            targets=tuple(self._targets),
        )
        self._trainer.write(folder, self._linears, context=context)


class _Undropped(nn.Module):
    """Holds a layer that is trained without dropout: the base's own is for training from far more text."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def train(self, mode: bool = True) -> _Undropped:
        """Stay as the layer is when it answers queries."""
        return self


@final
class FullForm(TrainedForm):
    """Every weight of the chosen layers; the embeddings and the layers below stay the base's."""

    def __init__(self, job: DomainJob, base: ResolvedBase) -> None:
        super().__init__(job, base)
        self._places = {
            name: path
            for path, tensors in checkpoint_files(base.folder).items()
            for name, tensor in tensors.items()
            if tensor.dtype in DTYPES
        }
        self._model: RetrievalBase | None = None

    def attach(self, model: RetrievalBase) -> Sequence[nn.Module]:
        """Set the layers free, in float32."""
        self._model = model
        layers = [model.encoder.get_submodule(self._name(number)) for number in self.layers]
        for layer in layers:
            layer.float().requires_grad_(True)
        self._check_names()
        return [_Undropped(layer) for layer in layers]

    def _name(self, layer: int) -> str:
        return f"{self.base.description.layers_prefix}.{layer}"

    def _trained(self) -> dict[str, nn.Parameter]:
        assert self._model is not None
        return {
            f"{self._name(number)}.{name}": parameter
            for number in self.layers
            for name, parameter in self._model.encoder.get_submodule(self._name(number)).named_parameters()
        }

    def _check_names(self) -> None:
        if foreign := sorted(set(self._trained()) - set(self._places)):
            raise TrainingError(
                "The base's checkpoint holds these tensors under other names, so a whole encoder cannot be written in "
                "its form. Train an adapter (form: adapter):",
                problems=capped(foreign),
            )

    def write(self, folder: Path) -> None:
        """Write a checkpoint with the base's own tensor names, its configuration and its tokenizer."""
        trained = self._trained()
        tensors = {
            name: trained[name].detach().to(self.dtype) if name in trained else _read(path, name)
            for name, path in self._places.items()
        }
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        for name in ("config.json", TOKENIZER_FILE, TOKENIZER_CONFIG):
            shutil.copyfile(self.base.folder / name, folder / name)


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        stored: torch.Tensor = file.get_tensor(name)
    return stored


def make_form(job: DomainJob, base: ResolvedBase) -> TrainedForm:
    """Return the form that the job asks for.

    Raises:
        UnknownNameError: A target that no linear of the job's layers has.
    """
    assert job.retrieval is not None
    return FullForm(job, base) if job.retrieval.form == "full" else AdapterForm(job, base)
