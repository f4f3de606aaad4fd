"""One whole model in the making: every tensor of the anchor is trained, and statistics are taken before the first step.

Knows models, trainers and routing artefacts; knows nothing of files of text, checkpoints or processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experts.routing_artifacts import NoiseInfo, RoutingArtifacts, RoutingInfo, StatisticsInfo
from pipelines.train.anchor import ResolvedBase, statistics_layer
from pipelines.train.corpus import Corpus
from pipelines.train.job import DomainJob
from pipelines.train.noisy_statistics import noisy_statistics
from pipelines.train.routing import StatisticsSum, statistics_tensors
from pipelines.train.states import SplitDecoder
from pipelines.train.trainers import get_trainer
from pipelines.train.trainers.base import ModelTrainer

__all__ = ["DenseRun"]

_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_STATE_BATCH = 8


class DenseRun:
    """Training state of one whole model; the methods are called in the order in which they stand.

    Args:
        job: What to train, of a kind whose trainer is a `ModelTrainer`.
        base: The anchor.
        model: The anchor's model with float32 parameters, on the device that is trained on; trained in place.
        corpus: The windows.
        dtype: What products are computed in, ``float32`` or ``bfloat16``.
    """

    cached = False

    def __init__(
        self, job: DomainJob, *, base: ResolvedBase, model: nn.Module, corpus: Corpus, dtype: str
    ) -> None:
        self.job = job
        self.base = base
        self.corpus = corpus
        trainer = get_trainer(job.kind)(rank=job.rank, alpha=job.alpha or float(job.rank))
        assert isinstance(trainer, ModelTrainer), "the worker asked"
        self.trainer = trainer
        self._model = model
        self._device = next(model.parameters()).device
        self._ids = corpus.ids.to(self._device)
        self._dtype = getattr(torch, dtype)
        self._layer = statistics_layer(job, base)
        self._statistics = StatisticsSum(
            normalization=job.statistics.normalization, skip_first=job.statistics.skip_first
        )
        self._noise: NoiseInfo | None = None

    def prepare_states(self) -> Iterator[int]:
        """Sum up the untrained anchor's states on the owner's windows; yields windows done."""
        if not self.job.statistics.enabled:
            return
        prefix = self.base.description.layers_prefix
        split = SplitDecoder(self._model, layers_prefix=prefix, first=self._layer)
        if self.job.statistics.noise is not None:
            self._statistics.total, self._noise = noisy_statistics(
                self.job, base=self.base, split=split, documents=self.corpus.single
            )
            return
        own = len(self.corpus.own)
        for start in range(0, own, _STATE_BATCH):
            stop = min(start + _STATE_BATCH, own)
            self._statistics.add(split.lower(self._ids[start:stop]))
            yield stop

    def attach(self) -> None:
        """Set the trained tensors free."""
        for parameter in self.trainer.trainable(self._model):
            parameter.requires_grad_(True)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Matrices, in a fixed order."""
        return [p for p in self.trainer.trainable(self._model) if p.dim() > 1]

    @property
    def gate_parameters(self) -> list[nn.Parameter]:
        """Norms and biases: trained without weight decay."""
        return [p for p in self.trainer.trainable(self._model) if p.dim() <= 1]

    def loss(self, windows: Tensor) -> Tensor:
        """Cross-entropy of the windows with these numbers, in nats a token."""
        ids = self._ids[windows]
        logits = self._logits(ids)
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def _logits(self, ids: Tensor) -> Tensor:
        mixed = self._dtype != torch.float32
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=mixed):
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits[:, :-1].float()

    @torch.no_grad()
    def held_out_nll(self) -> float | None:
        """Mean negative log-likelihood of the held-out windows, nats a token; None without any."""
        if self.corpus.held_out is None:
            return None
        ids = torch.from_numpy(self.corpus.held_out.ids).long().to(self._device)
        total = 0.0
        for batch in torch.split(ids, self.job.batch_size):
            logits = self._logits(batch)
            total += float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
        return total / (ids.shape[0] * (ids.shape[1] - 1))

    def write(self, folder: Path) -> RoutingInfo | None:
        """Write the model and its statistics into an empty folder; the model is on the CPU afterwards."""
        self._model.cpu()
        dtype = _TORCH_DTYPES[self.base.description.dtype]
        self.trainer.write(folder, self._model, anchor=self.base.folder, dtype=dtype)
        total = self._statistics.total
        if total is None:
            return None
        info = RoutingInfo(
            statistics=StatisticsInfo(
                layer=self._layer,
                normalization=self._statistics.normalization,
                tokens=int(total.count),
                documents=self.corpus.own.documents if self._noise is None else int(total.count),
                noise=self._noise,
            )
        )
        RoutingArtifacts(info=info, tensors=statistics_tensors(total)).save(folder)
        return info
