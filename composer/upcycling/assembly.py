"""Puts dense experts into a base model: trunk, stacked FFNs, attention experts, routers.

Reads tensors from the members' mapped files, one expert at a time. Knows modules and names; what a manifest may ask
for is checked before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from composer.layers.install import ExpertSource, stack_ffns
from composer.layers.moa import MoALayer, separate
from composer.layers.moe import MoELayer
from composer.manifest import AttentionSpec, RouterSpec, UpcycleSpec
from composer.recipes.routers import ANCHOR, ANCHOR_NAME, RouterMaker
from composer.upcycling.partition import KEYS_AND_VALUES, attention_module, partition
from composer.upcycling.trunk import adopt, merge_trunk
from experts.base import BaseDescription

if TYPE_CHECKING:
    from composer.members import Members
    from composer.model import ComposedForCausalLM
    from composer.routing.router import Router

__all__ = ["Seats", "assemble", "install"]

RouterFor = Callable[[int], "Router | None"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seats:
    """Who is routed to.

    Attributes:
        names: Id -> name, the anchor (0) first where it is an expert.
        sources: Id -> weights, the anchor left out; None: the place is left as it is allocated.
    """

    names: Mapping[int, str]
    sources: Mapping[int, ExpertSource | None]

    @property
    def with_anchor(self) -> bool:
        """Whether the base model's own modules are an expert."""
        return ANCHOR in self.names


def assemble(model: ComposedForCausalLM, members: Members) -> None:
    """Make an upcycled model of a base model and its members; see the recipes.

    Args:
        model: Holds the base model, still untouched.
        members: At least one.
    """
    spec = members.lock.upcycle
    assert spec is not None, "the plan wrote it out"
    base = members.description
    sources = [ExpertSource(member, base) for member in members.experts]
    seats = (
        _copies(model, base, sources[0], spec.copies) if spec.copies else _models(model, base, sources, spec)
    )
    model.membership = replace(
        model.membership,
        experts=tuple(name for expert, name in seats.names.items() if expert != ANCHOR),
        owners=tuple(s.member.locked.owner for s in seats.sources.values() if s is not None),
        parent_owners=tuple(s.member.locked.parent_owners for s in seats.sources.values() if s is not None),
        needs_all=_reason(spec),
        needs_one=not seats.with_anchor,
    )
    ffn = RouterMaker(members.lock.router, members, model, names=seats.names)
    others = tuple(seats.sources)
    attention: RouterMaker | None = None
    if spec.attention is not None:
        routed = _attention_router(members.lock.router, spec.attention, len(seats.names))
        attention = RouterMaker(routed, members, model, names=seats.names, branch="attention")
    install(
        model,
        base,
        seats,
        spec.attention,
        ffn_router=lambda layer: ffn.per_layer(layer, others),
        attention_router=lambda layer: None if attention is None else attention.per_layer(layer, others),
    )
    for maker in (ffn, attention):
        if maker is not None:
            maker.finish()


def _models(
    model: ComposedForCausalLM, base: BaseDescription, sources: Sequence[ExpertSource], spec: UpcycleSpec
) -> Seats:
    """Merge the trunk of several models, and seat them."""
    if spec.trunk != "frozen":
        assert spec.trunk is not None, "the plan wrote it out"
        parts = partition(base, spec.attention.kv if spec.attention else None)
        merge_trunk(model.base, parts.trunk, sources, spec.trunk, with_base=bool(spec.seed_expert))
    anchor = {ANCHOR: ANCHOR_NAME} if spec.seed_expert else {}
    return Seats(
        names={**anchor, **{source.id: source.member.locked.name for source in sources}},
        sources={source.id: source for source in sources},
    )


def _copies(model: ComposedForCausalLM, base: BaseDescription, source: ExpertSource, copies: int) -> Seats:
    """Let one model take the base's place, and seat copies of it beside itself."""
    parts = partition(base)
    adopt(model.base, [*parts.trunk, *parts.ffn], source)
    name = source.member.locked.name
    return Seats(
        names={number: f"{name}#{number}" for number in range(copies)},
        sources=dict.fromkeys(range(1, copies), source),
    )


def _reason(spec: UpcycleSpec) -> str | None:
    if spec.trunk == "frozen":
        return None
    if spec.copies:
        return (
            "Every tensor of this composition is of one owner's model, so a request cannot leave that owner out. Use "
            "the base itself, or load the composition with opt_out={...}."
        )
    return (
        "The trunk of this composition is merged from every owner's model, so a request cannot leave anybody out. "
        "Load the composition with opt_out={...}, which merges the trunk of the others anew; take the owner out with "
        "`coterie remove`; or build with `trunk: frozen`."
    )


def _attention_router(router: RouterSpec, spec: AttentionSpec, seats: int) -> RouterSpec:
    """Return the router of attention: the same scorer, its own rows, and all experts unless asked otherwise."""
    top_k = seats if spec.top_k is None else spec.top_k
    return router.model_copy(
        update={"selector": "topk", "selector_options": {}, "top_k": top_k, "normalize": True}
    )


def install(
    model: ComposedForCausalLM,
    base: BaseDescription,
    seats: Seats,
    attention: AttentionSpec | None,
    *,
    ffn_router: RouterFor,
    attention_router: RouterFor,
) -> None:
    """Put expert layers where the FFNs, and if asked for the attention, of every decoder layer are.

    Args:
        model: Holds the base model, whose trunk is as it shall be.
        base: The anchor's tensors.
        seats: Who is routed to.
        attention: How attention becomes experts; None: not at all.
        ffn_router: Called with a layer; returns its FFN router, or None where a model-wide gate decides.
        attention_router: The same for attention.
    """
    from composer.model import replace_ffn

    for layer in range(base.num_layers):
        name = f"{base.layers_prefix}.{layer}.{base.layout.module}"
        replace_ffn(model.base, name, _ffn_layer(model, base, seats, layer, ffn_router(layer)))
        if attention is not None:
            name = f"{base.layers_prefix}.{layer}.{attention_module(base)}"
            router = attention_router(layer)
            replace_ffn(model.base, name, _attention_layer(model, base, seats, attention, layer, router))
    if attention is not None and attention.kv == "own":
        model.caches_per_layer = len(seats.names)


def _ffn_layer(
    model: ComposedForCausalLM, base: BaseDescription, seats: Seats, layer: int, router: Router | None
) -> MoELayer:
    anchor = model.base.get_submodule(f"{base.layers_prefix}.{layer}.{base.layout.module}")
    sources = list(seats.sources.values())
    moe = MoELayer(
        layer=layer,
        experts=stack_ffns(model, base, layer, anchor, sources, with_anchor=seats.with_anchor),
        present=tuple(seats.sources),
        num_experts=len(seats.sources),
        router=router,
        with_anchor=seats.with_anchor,
    )
    return moe.to(next(anchor.parameters()).device).train(anchor.training)


def _attention_layer(
    model: ComposedForCausalLM,
    base: BaseDescription,
    seats: Seats,
    spec: AttentionSpec,
    layer: int,
    router: Router | None,
) -> MoALayer:
    prefix = f"{base.layers_prefix}.{layer}.{attention_module(base)}"
    anchor = model.base.get_submodule(prefix)
    shared = KEYS_AND_VALUES if spec.kv == "shared" else ()
    children = [child for name, child in anchor.named_children() if name in shared]
    # copies read the base's configuration as it is, since whoever loads the model may change it later
    kept = {id(part): part for part in (*children, getattr(anchor, "config", None)) if part is not None}
    experts = [anchor] if seats.with_anchor else []
    for source in seats.sources.values():
        expert = copy.deepcopy(anchor, dict(kept))
        if source is not None:
            _fill(expert, prefix, source, shared)
        experts.append(expert)
    layer_of = MoALayer(
        layer=layer,
        depth=base.num_layers,
        experts=_separated(experts, shared),
        num_experts=len(seats.sources),
        router=router,
        shared_kv=spec.kv == "shared",
        with_anchor=seats.with_anchor,
    )
    return layer_of.to(next(anchor.parameters()).device).train(anchor.training)


def _separated(experts: Sequence[nn.Module], shared: Sequence[str]) -> Sequence[nn.Module]:
    """Wrap what computes; what is shared is one module in all of them."""
    for expert in experts:
        separate(expert, shared)
    for name in shared:
        if hasattr(experts[0], name):
            for expert in experts[1:]:
                setattr(expert, name, getattr(experts[0], name))
    return experts


def _fill(expert: nn.Module, prefix: str, source: ExpertSource, shared: Sequence[str]) -> None:
    with source.opened(), torch.no_grad():
        for name, tensor in expert.state_dict(keep_vars=True).items():
            if name.partition(".")[0] not in shared:
                tensor.copy_(source.tensors[f"{prefix}.{name}"])
