"""What tuning minimises: cross-entropy of the mix, load balancing and the z-loss of every layer's router.

``L = L_NLL + sum_layers (a L_LB + b L_z)`` (BAM, arXiv 2408.08274, section 3; the terms are those of arXiv 2101.03961
and 2202.08906). Knows a composed model and windows; knows nothing of optimisers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composer.forward import RECORDER
from composer.routing.losses import load_balancing_loss, router_z_loss, tokens_per_expert
from composer.routing.types import RoutingDecision
from pipelines.tune.devices import OneDevice
from pipelines.tune.job import LoadBalancing

__all__ = ["Objective", "language_model_loss", "routing_decisions"]


def language_model_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of windows ``(batch, length)`` int64, nats a token."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@contextmanager
def routing_decisions() -> Iterator[list[tuple[int, RoutingDecision]]]:
    """Collect every layer's decision of the enclosed forward pass, its logits with their gradient."""
    seen: list[tuple[int, RoutingDecision]] = []
    token = RECORDER.set(lambda layer, decision, _: seen.append((layer, decision)))
    try:
        yield seen
    finally:
        RECORDER.reset(token)


class Objective:
    """Puts the gradients of one step into the parameters, micro-batch by micro-batch.

    Args:
        model: A composed model.
        ids: int64 ``(windows, length)``, on the model's device.
        parameters: What is trained.
        load_balancing: Its weight, and what it counts on.
        router_z_loss: Its weight.
        micro_batch: Windows at once; None: all.
        dtype: What products are computed in.
        devices: This process and its like.
    """

    def __init__(
        self,
        model: nn.Module,
        ids: Tensor,
        *,
        parameters: Sequence[nn.Parameter],
        load_balancing: LoadBalancing,
        router_z_loss: float,
        micro_batch: int | None = None,
        dtype: torch.dtype = torch.float32,
        devices: OneDevice | None = None,
    ) -> None:
        self.model = model
        self.ids = ids
        self.parameters = parameters
        self.load_balancing = load_balancing
        self.router_z_loss = router_z_loss
        self.micro_batch = micro_batch
        self.dtype = dtype
        self.devices = devices or OneDevice("cpu")
        self._counts: dict[int, Tensor] = {}

    def accumulate(self, windows: Tensor) -> float:
        """Take the gradients of one step's windows ``(batch,)``; return the loss, the mean over the devices."""
        self._counts = {}
        mine = self.devices.share(windows)
        total = 0.0
        for part in torch.split(mine, self.micro_batch or len(mine)):
            loss = self._loss(self.ids[part.to(self.ids.device)]) * (len(part) / len(mine))
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        self.devices.average_gradients(self.parameters)
        return self.devices.mean(total)

    def _loss(self, ids: Tensor) -> Tensor:
        low = self.dtype != torch.float32
        with (
            torch.autocast(ids.device.type, dtype=self.dtype, enabled=low),
            routing_decisions() as decisions,
        ):
            loss = language_model_loss(self.model, ids)
        for layer, decision in decisions:
            if decision.logits is not None:
                loss = loss + self._router_loss(layer, decision.indices, decision.logits)
        return loss

    def _router_loss(self, layer: int, indices: Tensor, logits: Tensor) -> Tensor:
        loss = logits.new_zeros(())
        if self.load_balancing.weight:
            counts = self._counted(layer, tokens_per_expert(indices, num_experts=logits.shape[-1]))
            loss = loss + self.load_balancing.weight * load_balancing_loss(logits, counts)
        if self.router_z_loss:
            loss = loss + self.router_z_loss * router_z_loss(logits)
        return loss

    def _counted(self, layer: int, counts: Tensor) -> Tensor:
        """Return what the balance is asked of: these tokens, or all of the step so far on all devices."""
        if self.load_balancing.over == "micro_batch":
            return counts
        counts = self.devices.sum(counts)
        self._counts[layer] = self._counts[layer] + counts if layer in self._counts else counts
        return self._counts[layer]
