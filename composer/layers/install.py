"""Puts experts' weights into a base model: one MoE layer per decoder layer that has any expert.

Reads tensors straight from the members' mapped files, one layer at a time. Knows the kinds' files; knows nothing
of how routers decide.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from composer.blocks.low_rank import LowRankExpert, LowRankFFN
from composer.blocks.mixed import MixedFFN
from composer.blocks.parts import FFNParts
from composer.blocks.stacked import StackedFFN
from composer.layers.moe import MoELayer
from experts.base import BaseDescription, LinearSpec
from experts.errors import AdmissionError
from experts.kinds import get_kind
from experts.kinds.lora import lora_spec, lora_tensor_names

if TYPE_CHECKING:
    from composer.members import Member, Members
    from composer.model import ComposedForCausalLM
    from composer.routing.router import Router

__all__ = ["ExpertSource", "install_experts", "stack_ffns"]

RouterFor = Callable[[int, Sequence[int]], "Router | None"]
Tensors = Mapping[str, torch.Tensor]


class ExpertSource:
    """One expert's weights, by layer and role.

    Args:
        member: The expert.
        base: The anchor's tensors, from which the expert's follow.
    """

    def __init__(self, member: Member, base: BaseDescription) -> None:
        self.member = member
        self.id = member.id
        self.kind = member.card.kind
        self.layers = frozenset(member.card.layers)
        self.base = base
        kind = get_kind(self.kind)
        self.weights_file = kind.weights_file
        config = kind.read_config(member.file(kind.config_file))
        self.tensors: Tensors = {}
        with self.opened():
            self.names = tuple(kind.resolve(config, base).shapes)
            _check_names(member, self.tensors, self.names)
        self.lora = lora_spec(config, base) if self.kind == "lora" else None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Map the file for the enclosed code; unmapping it gives back the pages that were read.

        One expert at a time: the pages of all of them would be a second copy of the layer in memory.
        """
        with self.member.tensors(self.weights_file) as self.tensors:
            yield
        self.tensors = {}

    def low_rank(self, layer: int, dtype: torch.dtype, device: torch.device) -> LowRankExpert:
        """Read the adapter of one layer."""
        assert self.lora is not None
        factors = {}
        with self.opened():
            for role, linear in self.base.ffn_linears(layer).items():
                if linear.name in self.lora.modules:
                    a, b = (self.tensors[name].to(device, dtype) for name in lora_tensor_names(linear.name))
                    factors[role] = (a, b, self.lora.modules[linear.name].scaling)
        return LowRankExpert(factors)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own."""
        with self.opened():
            return self.tensors[name].clone()

    def full(self, linear: LinearSpec, what: str) -> torch.Tensor:
        """Read one matrix (``what`` is ``weight``) or bias of a full FFN."""
        return self.tensors[f"{linear.name}.{what}"]


def _check_names(member: Member, tensors: Tensors, expected: Collection[str]) -> None:
    """Refuse a file that holds other tensors than its configuration gives, whoever wrote it since the build."""
    if set(tensors) != set(expected):
        extra, missing = sorted(set(tensors) - set(expected)), sorted(set(expected) - set(tensors))
        raise AdmissionError(
            f"The weights of {member.locked.name} are not what its configuration says: extra {extra[:5]}, "
            f"missing {missing[:5]}. Build the folder again."
        )


def install_experts(
    model: ComposedForCausalLM, members: Members, *, router_for: RouterFor, normalized: bool
) -> None:
    """Replace the FFN of every decoder layer that has experts.

    Args:
        model: Holds the base model.
        members: The experts to put in.
        router_for: Called with a layer and the ids present there; returns its router or None.
        normalized: Whether the selector's weights sum to 1.
    """
    base = members.description
    sources = [ExpertSource(member, base) for member in members.experts]
    for layer in sorted(set().union(*(source.layers for source in sources))):
        here = [source for source in sources if layer in source.layers]
        _install_layer(model, base, layer, here, len(sources), router_for, normalized)


def _install_layer(
    model: ComposedForCausalLM,
    base: BaseDescription,
    layer: int,
    sources: Sequence[ExpertSource],
    num_experts: int,
    router_for: RouterFor,
    normalized: bool,
) -> None:
    from composer.model import replace_ffn

    name = f"{base.layers_prefix}.{layer}.{base.layout.module}"
    anchor = model.base.get_submodule(name)
    low_rank = [source for source in sources if source.kind == "lora"]
    full = [source for source in sources if source.kind == "ffn"]
    present = [source.id for source in (*low_rank, *full)]
    block: LowRankFFN | StackedFFN | MixedFFN
    if not low_rank:
        block = stack_ffns(model, base, layer, anchor, full, with_anchor=True)
    else:
        block = _low_rank(base, layer, anchor, low_rank, normalized)
        if full:
            stacked = stack_ffns(model, base, layer, anchor, full, with_anchor=False)
            block = MixedFFN(low_rank=block, stacked=stacked)
    moe = MoELayer(
        layer=layer,
        experts=block,
        present=present,
        num_experts=num_experts,
        router=router_for(layer, sorted(present)),
    )
    replace_ffn(model.base, name, moe.to(next(anchor.parameters()).device).train(anchor.training))


def _low_rank(
    base: BaseDescription,
    layer: int,
    anchor: nn.Module,
    sources: Sequence[ExpertSource],
    normalized: bool,
) -> LowRankFFN:
    weight = next(anchor.parameters())
    return LowRankFFN(
        anchor=anchor,
        parts=FFNParts(anchor, base.layout),
        experts=[source.low_rank(layer, weight.dtype, weight.device) for source in sources],
        normalized=normalized,
    )


def stack_ffns(
    model: ComposedForCausalLM,
    base: BaseDescription,
    layer: int,
    anchor: nn.Module,
    sources: Sequence[ExpertSource | None],
    *,
    with_anchor: bool,
) -> StackedFFN:
    """Stack full FFNs in the layout of transformers' kernels, the anchor first where it belongs to the stack.

    Args:
        model: Whose configuration names the kernel.
        base: The anchor's tensors.
        layer: Which decoder layer.
        anchor: The anchor's own FFN there.
        sources: The experts; None: the place is left as it was allocated.
        with_anchor: Whether the anchor's FFN is the first of the stack.
    """
    parts = FFNParts(anchor, base.layout)
    linears = base.ffn_linears(layer)
    down = linears["down"]
    weight = parts.down.weight
    stacked = StackedFFN(
        num_experts=len(sources) + with_anchor,
        hidden_size=down.out_features,
        intermediate_size=down.in_features,
        gated=parts.gated,
        fused="gate_up" in parts.inputs,
        bias=down.bias,
        activation=parts.activation,
        config=model.config,
        dtype=weight.dtype,
        device=weight.device,
    ).requires_grad_(weight.requires_grad)
    with torch.no_grad():
        if with_anchor:
            _fill(stacked, 0, linears, lambda linear, what: getattr(_role(parts, linear.role), what))
        for position, source in enumerate(sources, start=int(with_anchor)):
            if source is None:
                continue
            with source.opened():
                _fill(stacked, position, linears, source.full)
    return stacked


def _role(parts: FFNParts, role: str) -> nn.Linear:
    return parts.down if role == "down" else parts.inputs[role]


def _fill(
    stacked: StackedFFN,
    position: int,
    linears: Mapping[str, LinearSpec],
    read: Callable[[LinearSpec, str], torch.Tensor],
) -> None:
    """Copy one FFN into the stack; gate rows come before up rows."""
    for what in ("weight", "bias") if stacked.has_bias else ("weight",):
        suffix = "" if what == "weight" else "_bias"
        target = getattr(stacked, stacked.input_name + suffix)[position]
        row = 0
        for role in ("gate", "gate_up", "up"):
            if role in linears:
                rows = linears[role].out_features
                target[row : row + rows].copy_(read(linears[role], what))
                row += rows
        getattr(stacked, f"down_proj{suffix}")[position].copy_(read(linears["down"], what))
