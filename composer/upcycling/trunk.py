"""The trunk of an upcycled model: the base's own, or merged tensor by tensor from the base and the dense experts.

Merging happens where the model is loaded, from the files of whoever is in it, so leaving somebody out gives the very
trunk of a model they never joined. Knows tensors by name; knows nothing of routers or experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from composer.manifest import TrunkSpec
from composer.merge_methods import BASE, merge_problems
from composer.merging import merge_tensors
from experts.errors import BuildError
from experts.files import capped

if TYPE_CHECKING:
    from composer.layers.install import ExpertSource

__all__ = ["adopt", "copies", "merge_one", "merge_trunk", "places", "reduced", "unlike_copies"]

_HEADS = ("lm_head.weight", "embed_out.weight")


def merge_trunk(
    model: nn.Module,
    names: Sequence[str],
    sources: Sequence[ExpertSource],
    spec: TrunkSpec,
    *,
    with_base: bool,
) -> None:
    """Replace tensors of the base model by their merge, one at a time.

    Args:
        model: The base model.
        names: The trunk's tensors.
        sources: The dense experts, in canonical order.
        spec: How to merge.
        with_base: Whether the base is one of the merged models.

    Raises:
        BuildError: The method does not merge what is left where somebody is left out, a tensor has no place, or a model
            has two different ones for one place.
    """
    spec = reduced(spec, [source.member.locked.name for source in sources], with_base=with_base)
    _check_copies(model, names, sources)
    for name, target in places(model, names).items():
        # one tensor of every model is in memory at a time
        merged = merge_one(name, sources, spec, base=target.detach().cpu() if with_base else None)
        with torch.no_grad():
            target.copy_(merged)


def reduced(spec: TrunkSpec, others: Sequence[str], *, with_base: bool) -> TrunkSpec:
    """Return how the trunk of those who are left is merged.

    Args:
        spec: As the composition says it of everybody.
        others: Names of the models, in canonical order.
        with_base: Whether the base is one of the merged models.

    Raises:
        BuildError: The method does not merge them.
    """
    spec = spec.without(set(spec.weights) - {*others, BASE})
    problems = merge_problems(
        spec.method, list(others), base=with_base, weights=spec.weights, parameters=spec.parameters
    )
    if problems:  # the plan had more models, or others
        raise BuildError(f"The trunk of {', '.join(others)} cannot be merged:", problems=problems)
    return spec


def merge_one(
    name: str, sources: Sequence[ExpertSource], spec: TrunkSpec, *, base: torch.Tensor | None
) -> torch.Tensor:
    """Merge one tensor of the trunk, read from the models' files.

    Args:
        name: Of the tensor, in a checkpoint.
        sources: The models, in canonical order.
        spec: What `reduced` returned.
        base: The base's tensor as the model is loaded with it; None: the base takes no part.

    Returns:
        float32, on the CPU.
    """
    return merge_tensors(
        {source.member.locked.name: source.read(name) for source in sources},
        method=spec.method,
        base=base,
        weights=spec.weights,
        parameters=spec.parameters,
        name=name,
    )


def adopt(model: nn.Module, names: Sequence[str], source: ExpertSource) -> None:
    """Copy tensors of one dense model into the base model.

    Raises:
        BuildError: A tensor has no place, or the model has two different ones for one place.
    """
    _check_copies(model, names, [source])
    with source.opened(), torch.no_grad():
        for name, target in places(model, names).items():
            target.copy_(source.tensors[name])


def places(model: nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return where the tensors of a checkpoint are in the model, each once.

    A checkpoint may list a tensor twice, where input and output embeddings are tied: that is one parameter, by the name
    that the model itself gives it.

    Raises:
        BuildError: One of them is nowhere.
    """
    kept = _kept(model, names)
    lost = [name for name in names if name not in kept]
    if lost:
        raise BuildError(
            "The base's checkpoint has tensors that its class keeps under other names, so they cannot be merged; "
            "build with `trunk: frozen`:",
            problems=capped(lost),
        )
    state = _state(model)
    return {name: state[name] for name in names if kept[name] == name}


def copies(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Return the names that `places` leaves out, each with the name under which the tensor is there."""
    return {name: other for name, other in _kept(model, names).items() if name != other}


def unlike_copies(who: str, copy: str, name: str) -> BuildError:
    """Return the refusal of a model whose two tensors are not one, as they are in the base."""
    return BuildError(
        f"{who}: '{copy}' and '{name}' differ, but the base ties them: they are one tensor of it, and nothing "
        "holds two. Fine-tune the model with the embeddings tied, or publish it as a model of a base that does not tie "
        "them."
    )


def _check_copies(model: nn.Module, names: Sequence[str], sources: Sequence[ExpertSource]) -> None:
    for copy, name in copies(model, names).items():
        for source in sources:
            if not torch.equal(source.read(copy), source.read(name)):
                raise unlike_copies(source.member.locked.name, copy, name)


def _kept(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Return the one name of the tensor behind every name that the model knows."""
    state = _state(model)
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    known = [name for name in names if name in state]
    kept: dict[int, str] = {}
    for name in known:
        key = id(state[name])
        kept[key] = name if own.get(key) == name else kept.get(key, name)
    return {name: kept[id(state[name])] for name in known}


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name in _HEADS:  # GPT-NeoX's head has another name in a checkpoint than in memory
        state.setdefault(name, head.weight)
    return state
