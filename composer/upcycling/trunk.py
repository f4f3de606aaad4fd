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
from composer.merging import BASE, merge_problems, merge_tensors
from experts.errors import BuildError
from experts.files import capped

if TYPE_CHECKING:
    from composer.layers.install import ExpertSource

__all__ = ["adopt", "merge_one", "merge_trunk", "places", "reduced"]

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
        BuildError: The method does not merge what is left where somebody is left out, or a tensor has no place.
    """
    spec = reduced(spec, [source.member.locked.name for source in sources], with_base=with_base)
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
    """Copy tensors of one dense model into the base model."""
    with source.opened(), torch.no_grad():
        for name, target in places(model, names).items():
            target.copy_(source.tensors[name])


def places(model: nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return where the tensors of a checkpoint are in the model.

    Raises:
        BuildError: One of them is nowhere.
    """
    state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name in _HEADS:  # GPT-NeoX's head has another name in a checkpoint than in memory
        state.setdefault(name, head.weight)
    lost = [name for name in names if name not in state]
    if lost:
        raise BuildError(
            "The base's checkpoint has tensors that its class keeps under other names, so they cannot be merged; "
            "build with `trunk: frozen`:",
            problems=capped(lost),
        )
    return {name: state[name] for name in names}
