"""Training an expert to share a token with the anchor: a two-way mixture with a frozen public half.

Knows one FFN, its trainable twin and the two router rows; knows nothing of other owners, who never meet here.
FlexOlmo, arXiv 2507.07024, section 3.2, with the softmax over [public, own] and top-2 of 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.train.trainers.base import TrainableLinear

__all__ = ["CoordinatedFFN", "NegativeBias", "attach", "twin"]


@final
class NegativeBias(nn.Module):
    """A scalar that is never above zero.

    ``softplus``: ``-softplus(raw)``, smooth everywhere. ``clamp``: ``min(raw, 0)``, the paper's; a value that
    drifts above zero stops learning, hence not the default.

    Args:
        init: Starting value, below zero.
        form: Which of the two.
    """

    def __init__(self, *, init: float, form: Literal["softplus", "clamp"]) -> None:
        super().__init__()
        start = torch.tensor([init], dtype=torch.float32)
        self.form = form
        # softplus(raw) = -init  <=>  raw = log(exp(-init) - 1)
        self.raw = nn.Parameter(start if form == "clamp" else torch.log(torch.expm1(-start)))

    def forward(self) -> Tensor:
        """``(1,)`` float32, at most zero."""
        if self.form == "clamp":
            return torch.minimum(self.raw, torch.zeros_like(self.raw))
        return -F.softplus(self.raw)


@final
class CoordinatedFFN(nn.Module):
    """``p_pub FFN_pub(h) + p_own FFN_own(h)``, ``p = softmax([r_pub . h, r_own . h + b])`` in float32.

    Args:
        public: The anchor's FFN, frozen.
        own: Its trainable twin.
        public_row: ``(hidden,)`` float32; frozen and a buffer, so that no optimiser can reach it.
        own_row: ``(hidden,)`` float32 starting value of the owner's row.
        bias: None leaves the owner's row without one.
    """

    public_row: Tensor

    def __init__(
        self,
        public: nn.Module,
        *,
        own: nn.Module,
        public_row: Tensor,
        own_row: Tensor,
        bias: NegativeBias | None,
    ) -> None:
        super().__init__()
        self.public = public
        self.own = own
        self.bias = bias
        self.register_buffer("public_row", public_row.detach().to(torch.float32).clone())
        self.row = nn.Parameter(own_row.detach().to(torch.float32).clone())
        self.last_logits: Tensor | None = None

    def gate(self, hidden: Tensor) -> Tensor:
        """Router logits ``(..., 2)`` in float32: public first, the owner's second."""
        logits = F.linear(hidden.float(), torch.stack([self.public_row, self.row]))
        if self.bias is None:
            return logits
        return logits + torch.cat([torch.zeros_like(self.bias.raw), self.bias()])

    def forward(self, hidden: Tensor) -> Tensor:
        """``(..., hidden)`` to the same shape; keeps the logits for the losses on the router."""
        self.last_logits = self.gate(hidden)
        share = torch.softmax(self.last_logits, dim=-1).to(hidden.dtype)
        mixed: Tensor = share[..., :1] * self.public(hidden) + share[..., 1:] * self.own(hidden)
        return mixed


def twin(ffn: nn.Module, *, linears: Mapping[str, nn.Module]) -> nn.Module:
    """A shallow copy of ``ffn`` that shares every tensor with it, except for the replaced linears.

    Args:
        ffn: Any module; it is not changed.
        linears: Replacements by the name of the direct child they replace.
    """
    copy = object.__new__(type(ffn))
    copy.__dict__.update(ffn.__dict__)
    copy.__dict__["_modules"] = {**ffn._modules, **linears}
    return copy


def attach(
    model: nn.Module,
    names: Mapping[int, list[str]],
    *,
    wrap: Callable[[nn.Linear], TrainableLinear],
    combine: Callable[[int, nn.Module, nn.Module], nn.Module] | None = None,
) -> dict[str, TrainableLinear]:
    """Replace the FFN of each listed layer by its trainable twin, or by a mixture of both.

    Args:
        model: The anchor; changed in place.
        names: Full module names of the FFN linears by layer; the linears of a layer share one parent.
        wrap: Makes the trainable stand-in of a linear.
        combine: Called with layer, FFN and twin; returns the module to put in the FFN's place (None: the twin).

    Returns:
        The stand-ins by the full names of the linears they replace.
    """
    trained: dict[str, TrainableLinear] = {}
    for layer in sorted(names):
        (parent,) = {name.rpartition(".")[0] for name in names[layer]}
        ffn = model.get_submodule(parent)
        linears = {}
        for name in sorted(names[layer]):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear), f"{name} is a {type(linear).__name__}, not a linear"
            linears[name.rpartition(".")[2]] = trained[name] = wrap(linear)
        own = twin(ffn, linears=linears)
        model.set_submodule(parent, combine(layer, ffn, own) if combine else own)
    return trained
