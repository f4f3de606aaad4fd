"""Merges whole models into the base model's place: every tensor that some expert changes, one at a time.

An expert that does not change a tensor takes part with the base's, as its whole model would. Knows tensors by name and
the experts' kinds; what a manifest may ask for is checked before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from composer.layers.install import ExpertSource
from composer.manifest import TrunkSpec
from composer.merge_methods import METHODS
from composer.merging import merge_tensors
from composer.upcycling.trunk import copies, places, reduced, unlike_copies
from experts.kinds.lora import lora_tensor_names

if TYPE_CHECKING:
    from composer.members import Members
    from composer.model import ComposedForCausalLM

__all__ = ["merge_whole"]

_REASON = (
    "This composition is one dense model merged from every owner's, so a request cannot leave anybody out. Load it "
    "with opt_out={...}, which merges the others anew, or take the owner out with `coterie remove`."
)


def merge_whole(model: ComposedForCausalLM, members: Members) -> None:
    """Replace the base model's tensors by their merge.

    Args:
        model: Holds the base model, still untouched.
        members: At least one.

    Raises:
        BuildError: The method does not merge what is left where somebody is left out, a tensor has no place, or a model
            has two different ones for one place.
    """
    spec = members.lock.upcycle
    assert spec is not None, "the plan wrote it out"
    assert isinstance(spec.trunk, TrunkSpec), "the plan checked it"
    sources = [ExpertSource(member, members.description) for member in members.experts]
    names = _wanted(model, members, sources)
    with_base = bool(spec.seed_expert) or METHODS[spec.trunk.method].base == "needed"
    trunk = reduced(spec.trunk, [source.member.locked.name for source in sources], with_base=with_base)
    with torch.no_grad():
        for name, target in places(model.base, names).items():
            own = target.detach().cpu()
            merged = merge_tensors(
                {source.member.locked.name: _dense(source, name, own) for source in sources},
                method=trunk.method,
                base=own if with_base else None,
                weights=trunk.weights,
                parameters=trunk.parameters,
                name=name,
            )
            target.copy_(merged)
    model.membership = replace(model.membership, needs_all=_REASON)


def _wanted(model: ComposedForCausalLM, members: Members, sources: Sequence[ExpertSource]) -> list[str]:
    """Return what is merged: tensors that some expert changes, in the base's order; a tied pair is one tensor."""
    changed = set().union(*(_changed(source) for source in sources))
    pairs = copies(model.base, list(members.description.tensors))
    for copy, name in pairs.items():
        if not {copy, name} & changed:
            continue
        own = places(model.base, [name])[name].detach().cpu()
        for source in sources:
            if not torch.equal(_dense(source, copy, own), _dense(source, name, own)):
                raise unlike_copies(source.member.locked.name, copy, name)
    wanted = {pairs.get(name, name) for name in changed}
    return [name for name in members.description.tensors if name in wanted]


def _changed(source: ExpertSource) -> set[str]:
    """Return the base's tensors that an expert brings of its own or adds to."""
    if source.lora is not None:
        return {f"{module}.weight" for module in source.lora.modules}
    return set(source.names)


def _dense(source: ExpertSource, name: str, own: Tensor) -> Tensor:
    """Return a tensor as the expert's whole model has it; ``W + s B A`` is summed in float32."""
    if name not in _changed(source):
        return own
    if source.lora is None:
        return source.read(name)
    module = name.removesuffix(".weight")
    a, b = (source.read(factor).float() for factor in lora_tensor_names(module))
    return own.float() + source.lora.modules[module].scaling * (b @ a)
