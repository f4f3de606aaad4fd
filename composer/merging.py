"""Merging the same tensor of several models into one, by mergekit's methods or as a plain mean.

mergekit gets tensors, never folders: nothing is written, and its class-level cache of open checkpoints (which serves a
folder that was rewritten in place from its old content) stays empty. Knows nothing of models, owners or files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from composer.merge_methods import AVERAGE, BASE, METHODS
from experts.errors import BuildError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["merge_tensors"]


def merge_tensors(
    tensors: Mapping[str, Tensor],
    *,
    method: str,
    base: Tensor | None = None,
    weights: Mapping[str, float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    name: str,
    seed: int = 0,
) -> Tensor:
    """Merge one tensor of several models.

    The result depends on nothing but the arguments: what a method draws at random comes from the seed and the name.

    Args:
        tensors: By model, all of one shape, in the order of the sums. Not changed.
        method: A name of `METHODS`; the arguments must be free of `merge_problems`.
        base: The base's tensor, if it takes part: as what differences are taken to, or as the first model.
        weights: By model, or `BASE`; 1 where nothing is said.
        parameters: The method's settings; one value, or values by model.
        name: Of the tensor.
        seed: Of the draws.

    Returns:
        float32, on the CPU, so that every machine with one kind of processor rounds alike.

    Raises:
        BuildError: The method does not merge these very values.
    """
    import torch

    inputs = {**({} if base is None else {BASE: base}), **tensors}
    wanted = {key: (weights or {}).get(key, 1.0) for key in inputs}
    if method == AVERAGE:
        return _mean(inputs, wanted)
    from mergekit.merge_methods import merge_tensors as merge

    found = METHODS[method]
    settings = dict(parameters or {})
    if found.weighted:
        if found.base != "alike":
            wanted.pop(BASE, None)
        settings["weight"] = wanted
    for key in found.each:
        if isinstance(settings.get(key), Mapping):
            settings[key] = _completed(method, key, settings[key], list(tensors))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_tensor_seed(seed, name))
        try:
            merged: Tensor = merge(
                [tensor.cpu() for tensor in inputs.values()],
                method,
                parameters=settings,
                ids=list(inputs),
                base_index=0 if base is not None and found.base != "alike" else None,
                name=name,
                dtype=torch.float32,
            )
        except ValueError as error:  # only the values tell, so no plan could
            raise BuildError(f"Method '{method}' cannot merge '{name}': {error}") from None
    return merged.float()


def _mean(inputs: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return ``sum_j w_j T_j / sum_j w_j``; models of weight 0 are not touched."""
    import torch

    total: Tensor | None = None
    with torch.no_grad():
        for key, tensor in inputs.items():
            if weights[key] == 0:
                continue
            part = tensor.detach().to("cpu", torch.float32)
            part = part if weights[key] == 1 else part * weights[key]
            total = part.clone() if total is None else total.add_(part)
        assert total is not None
        return total.div_(sum(weights.values()))


def _completed(method: str, key: str, values: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """Give every model a value: mergekit's default where the mapping says nothing."""
    from mergekit.merge_methods import get

    default = next(spec.default for spec in get(method).spec.parameters if spec.name == key)
    return {model: values.get(model, default) for model in models}


def _tensor_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
