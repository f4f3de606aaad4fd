"""One expert in the making: the frozen anchor, what is attached to it, its losses, and what is written.

Knows models, trainers and routing artefacts; knows nothing of files of text, checkpoints or processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from experts.routing_artifacts import (
    EmbeddingInfo,
    NoiseInfo,
    RoutingArtifacts,
    RoutingInfo,
    RowsInfo,
    StatisticsInfo,
)
from pipelines.train.anchor import ResolvedBase
from pipelines.train.coordination import CoordinatedFFN, NegativeBias, attach
from pipelines.train.corpus import Corpus
from pipelines.train.job import DomainJob
from pipelines.train.noisy_statistics import noisy_statistics
from pipelines.train.routing import StatisticsSum, statistics_tensors
from pipelines.train.rows import rows_digest
from pipelines.train.starting_rows import starting_rows
from pipelines.train.states import SplitDecoder, StateCache
from pipelines.train.trainers import get_trainer
from pipelines.train.trainers.base import ExpertTrainer, TrainableLinear, WriteContext

__all__ = ["ExpertRun"]

_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

_STATE_BATCH = 8
"""Windows that go through the lower layers at once."""


class ExpertRun:
    """Training state of one expert; the methods are called in the order in which they stand.

    Args:
        job: What to train.
        base: The anchor.
        model: The anchor's model, frozen, on the device that is trained on; changed in place by `attach`.
        corpus: The windows.
    """

    def __init__(self, job: DomainJob, *, base: ResolvedBase, model: nn.Module, corpus: Corpus) -> None:
        self.job = job
        self.base = base
        self.corpus = corpus
        self.layers = job.layer_numbers(base.description.num_layers)
        trainer = get_trainer(job.kind)(rank=job.rank, alpha=job.alpha or float(job.rank))
        assert isinstance(trainer, ExpertTrainer), "the worker asked"
        self.trainer = trainer
        self._model = model
        self._split = SplitDecoder(model, layers_prefix=base.description.layers_prefix, first=self.layers[0])
        self._device = self._split.device
        self._ids = corpus.ids.to(self._device)
        self.cached = self._split.agrees(self._ids[:1])
        self._cache = StateCache(
            self._split, self._ids, limit_bytes=int(job.cache_gigabytes * 1e9), usable=self.cached
        )
        self._statistics = StatisticsSum(
            normalization=job.statistics.normalization, skip_first=job.statistics.skip_first
        )
        self._noise: NoiseInfo | None = None
        self._held_out_states: Tensor | None = None
        self._linears: dict[str, TrainableLinear] = {}
        self._mixtures: dict[int, CoordinatedFFN] = {}
        self._rows_info: RowsInfo | None = None
        self._embedding: tuple[EmbeddingInfo, NDArray[np.float32]] | None = None

    def prepare_states(self) -> Iterator[int]:
        """Run the lower layers over all windows once, for the cache and the statistics; yields windows done."""
        exact = self.job.statistics.enabled and self.job.statistics.noise is None
        if self.job.statistics.enabled and not exact:
            self._statistics.total, self._noise = noisy_statistics(
                self.job, base=self.base, split=self._split, documents=self.corpus.single
            )
        if not exact and not (self.cached and self.layers[0]):
            return
        own = len(self.corpus.own)
        for part, states in self._cache.fill(batch_size=_STATE_BATCH):
            if exact and part.start < own:
                self._statistics.add(states[: own - part.start])
            yield part.stop

    def attach(self) -> None:
        """Put the trainable FFNs into the model, inside mixtures where the job coordinates.

        What is drawn at random is drawn on the CPU, so that training starts at the same place on every device.
        """
        generator = torch.Generator().manual_seed(self.job.seed)
        description = self.base.description
        names = {
            layer: [spec.name for spec in description.ffn_linears(layer).values()] for layer in self.layers
        }
        combine = self._mixture_maker() if self.job.coordination.enabled else None
        self._linears = attach(
            self._model,
            names,
            wrap=lambda linear: self.trainer.wrap(linear, generator=generator).to(self._device),
            combine=combine,
        )

    def _mixture_maker(self) -> Callable[[int, nn.Module, nn.Module], nn.Module]:
        rows = starting_rows(
            self.job,
            base=self.base,
            model=self._model,
            split=self._split,
            corpus=self.corpus,
            layers=self.layers,
        )
        bias = self.job.bias

        def combine(layer: int, ffn: nn.Module, twin: nn.Module) -> nn.Module:
            negative = NegativeBias(init=bias.init, form=bias.form) if bias.enabled else None
            mixture = CoordinatedFFN(
                ffn, own=twin, public_row=rows.public[layer], own_row=rows.own[layer], bias=negative
            )
            self._mixtures[layer] = mixture.to(self._device)
            return mixture

        self._embedding = rows.embedding
        self._rows_info = RowsInfo(
            layers=self.layers,
            has_bias=bias.enabled,
            public_digest=rows_digest(rows.public),
            init=rows.init,
        )
        return combine

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The expert's own matrices, in a fixed order."""
        return [p for name in sorted(self._linears) for p in self._trainable(self._linears[name])]

    @property
    def gate_parameters(self) -> list[nn.Parameter]:
        """Rows and biases: trained without weight decay."""
        mixtures = [self._mixtures[layer] for layer in sorted(self._mixtures)]
        rows = [mixture.row for mixture in mixtures]
        return rows + [mixture.bias.raw for mixture in mixtures if mixture.bias is not None]

    @staticmethod
    def _trainable(module: nn.Module) -> list[nn.Parameter]:
        return [parameter for parameter in module.parameters() if parameter.requires_grad]

    def loss(self, windows: Tensor) -> Tensor:
        """Cross-entropy of the windows with these numbers, in nats a token, plus the losses on the router."""
        ids = self._ids[windows]
        logits = self._split.logits(ids, states=self._cache.get(windows))[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        settings = self.job.coordination
        if settings.enabled:
            if settings.softmax_z_loss:
                loss = loss + settings.softmax_z_loss * logits.logsumexp(dim=-1).square().mean()
            loss = loss + self._router_loss(windows < len(self.corpus.own))
        return loss

    def _router_loss(self, is_own: Tensor) -> Tensor:
        """Mean over layers of the z-loss and of the own-against-public cross-entropy of the rows."""
        z_weight, bce_weight = self.job.coordination.router_z_loss, self.job.row_negatives
        total = torch.zeros((), device=self._device)
        for mixture in self._mixtures.values():
            gate = mixture.last_logits
            assert gate is not None
            total = total + z_weight * gate.logsumexp(dim=-1).square().mean()
            if bce_weight:
                margin = gate[..., 1] - gate[..., 0]
                target = is_own.to(margin.device, margin.dtype)[:, None].expand_as(margin)
                total = total + bce_weight * F.binary_cross_entropy_with_logits(margin, target)
            mixture.last_logits = None
        return total / max(1, len(self._mixtures))

    @torch.no_grad()
    def held_out_nll(self) -> float | None:
        """Mean negative log-likelihood of the held-out windows, nats a token; None without any."""
        if self.corpus.held_out is None:
            return None
        ids = torch.from_numpy(self.corpus.held_out.ids).long().to(self._device)
        if self._held_out_states is None and self.cached and self._split.first:
            self._held_out_states = self._split.lower(ids)
        total = 0.0
        for start in range(0, len(ids), self.job.batch_size):
            part = slice(start, start + self.job.batch_size)
            batch, states = ids[part], self._held_out_states
            logits = self._split.logits(batch, states=None if states is None else states[part])[
                :, :-1
            ].float()
            total += float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
        return total / (ids.shape[0] * (ids.shape[1] - 1))

    def write(self, folder: Path) -> RoutingInfo | None:
        """Write the expert's files and its routing artefacts into an empty folder, from the CPU's form of the tensors.

        The run is over then: what was trained is on the CPU.
        """
        for module in (*self._linears.values(), *self._mixtures.values()):
            module.cpu()
        context = WriteContext(
            base_name=self.base.ref.name,
            layers_prefix=self.base.description.layers_prefix,
            layers=self.layers,
            dtype=_TORCH_DTYPES[self.base.description.dtype],
        )
        self.trainer.write(folder, self._linears, context=context)
        info, tensors = self._routing()
        if info is not None:
            RoutingArtifacts(info=info, tensors=tensors).save(folder)
        return info

    def _routing(self) -> tuple[RoutingInfo | None, dict[str, Any]]:
        statistics = self._statistics.total
        if statistics is None and self._rows_info is None:
            return None, {}
        tensors: dict[str, Any] = statistics_tensors(statistics) if statistics else {}
        for layer, mixture in self._mixtures.items():
            tensors[f"row.{layer}.weight"] = mixture.row.detach().numpy()
            if mixture.bias is not None:
                tensors[f"row.{layer}.bias"] = mixture.bias().detach().numpy()
        embedding = None
        if self._embedding is not None:
            embedding, tensors["embedding"] = self._embedding
        info = RoutingInfo(statistics=self._statistics_info(), rows=self._rows_info, embedding=embedding)
        return info, tensors

    def _statistics_info(self) -> StatisticsInfo | None:
        total = self._statistics.total
        if total is None:
            return None
        return StatisticsInfo(
            layer=self.layers[0],
            normalization=self._statistics.normalization,
            tokens=int(total.count),
            documents=self.corpus.own.documents if self._noise is None else int(total.count),
            noise=self._noise,
        )
