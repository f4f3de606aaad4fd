"""What routers read while all tokens go to one expert: for rows made of prompts, and for owners' statistics.

Runs the composed model with forced routing, so the states are those of the expert's own path. Knows models and texts;
knows nothing of how a router is solved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from composer.forward import FORCED, Branch, Forced
from composer.routing.router import Router
from composer.routing.scorers.prompts import PromptScorer
from composer.upcycling.partition import attention_module
from experts.errors import BuildError
from experts.routing_artifacts import InputsInfo, RoutingArtifacts, RoutingInfo, Statistics

if TYPE_CHECKING:
    from composer.members import Members
    from composer.model import ComposedForCausalLM
    from experts.base import BaseDescription

__all__ = ["fill_prompt_rows", "inputs_artifacts", "public_inputs", "router_inputs"]

MAX_PROMPT = 512
"""Longest prompt, tokens; what follows is not read."""

Inputs = dict[tuple[Branch, int], Statistics]
Means = dict[int, torch.Tensor]
"""Layer -> float32 ``(d,)``."""
_Add = Callable[[int, torch.Tensor], None]
"""Takes a layer and the states ``(batch, positions, d)`` that its router reads."""


def router_inputs(model: ComposedForCausalLM, windows: Iterable[torch.Tensor], *, expert: int) -> Inputs:
    """Sum up the states that every router reads while all tokens go to one expert.

    An owner takes them in a composition of the base and their own model with ``trunk: frozen``; public ones are those
    of expert 0, the anchor.

    Args:
        model: A composed model with a router per layer.
        windows: Token ids, int64 ``(rows, positions)``, unpadded.
        expert: Id of the expert.

    Returns:
        ``(branch, layer)`` -> n, sum x and sum x xT in float64, x as the router reads it.

    Raises:
        ValueError: ``expert`` is the anchor, and the base is no expert of this composition.
    """
    found: Inputs = {}

    def watch(layer: int, branch: Branch, states: torch.Tensor, mask: torch.Tensor | None) -> None:
        part = Statistics.from_states(states.flatten(0, 1).double().cpu().numpy())
        key = (branch, layer)
        found[key] = found[key] + part if key in found else part

    with _forced(expert, watch), torch.no_grad():
        for ids in windows:
            model(ids.to(model.device), use_cache=False)
    return found


def inputs_artifacts(found: Inputs, *, documents: int) -> RoutingArtifacts:
    """Return the sums as the artefact that owners, or the base, publish.

    Args:
        found: From `router_inputs`.
        documents: Of how many documents they are.
    """
    layers = tuple(sorted({layer for _, layer in found}))
    branches: tuple[Branch, ...] = tuple(sorted({branch for branch, _ in found}, reverse=True))
    tokens = {int(statistics.count) for statistics in found.values()}
    assert len(tokens) == 1, "every layer sees every token"
    tensors: dict[str, Any] = {}
    for (branch, layer), statistics in found.items():
        name = f"inputs.{branch}.{layer}"
        tensors[f"{name}.count"] = np.array([statistics.count])
        tensors[f"{name}.sum"] = statistics.sum
        tensors[f"{name}.scatter"] = statistics.scatter
    info = InputsInfo(layers=layers, branches=branches, tokens=tokens.pop(), documents=documents)
    return RoutingArtifacts(info=RoutingInfo(inputs=info), tensors=tensors)


def public_inputs(model: ComposedForCausalLM, members: Members, *, branch: Branch) -> Means:
    """Return the mean state that each layer's router would read on public prompts in the base itself.

    The base need not be an expert for that, and what is measured is the same whoever is one.

    Args:
        model: Its FFNs and attention are still the base's own, its trunk is as it shall be.
        members: Whose manifest names the prompts.
        branch: Of which routers.

    Returns:
        The mean over prompts of each one's mean, by layer; empty where there are no prompts.
    """
    prompts = members.lock.router.public_prompts
    if not prompts:
        return {}
    ids = _token_ids(_tokenizer(members), prompts, what="router.public_prompts")
    return _mean_inputs(model.base, ids, lambda add: _hooked(model.base, members.description, branch, add))


def fill_prompt_rows(
    model: ComposedForCausalLM, members: Members, *, branch: Branch, public: Mapping[int, torch.Tensor]
) -> None:
    """Fill in the rows of every `PromptScorer` of one branch.

    Args:
        model: Fully assembled but for these rows.
        members: Whose prompts are read, with the tokenizer of their folder.
        branch: Whose routers are filled in.
        public: From `public_inputs`.

    Raises:
        BuildError: A prompt has no tokens, or some state is not finite.
    """
    tokenizer = _tokenizer(members)
    scorers = {layer: router.scorer for layer, router in _routers(model, branch)}
    for member in members.experts:
        name = member.locked.name
        positive, negative = (
            _forced_means(model, _token_ids(tokenizer, prompts, what=name), expert=member.id, branch=branch)
            for prompts in (member.locked.positive_prompts, member.locked.negative_prompts)
        )
        for layer, scorer in scorers.items():
            assert isinstance(scorer, PromptScorer)
            if member.id not in scorer.position:
                continue  # it has no block there, so nobody is routed to it
            direction = positive[layer]
            for other in (negative, public):
                direction = direction - other[layer] if other else direction
            if not direction.isfinite().all():
                raise BuildError(
                    f"The states that the {branch} router of layer {layer} reads on the prompts of {name} are not "
                    f"finite in {str(model.dtype).removeprefix('torch.')}, so no row can be made of them. Load in "
                    f"float32, or leave {name} out."
                )
            scorer.set_row(member.id, direction)


def _routers(model: ComposedForCausalLM, branch: Branch) -> Iterator[tuple[int, Router]]:
    from composer.layers.moa import MoALayer
    from composer.layers.moe import MoELayer

    kind = MoELayer if branch == "ffn" else MoALayer
    for module in model.modules():
        if isinstance(module, kind) and module.router is not None:
            yield module.layer, module.router


def _tokenizer(members: Members) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(members.folder, local_files_only=True)


def _token_ids(tokenizer: Any, prompts: Sequence[str], *, what: str) -> list[torch.Tensor]:
    """Return the ids of each prompt, int64 ``(1, positions)``.

    Raises:
        BuildError: One of them has none.
    """
    ids = [tokenizer(prompt, return_tensors="pt").input_ids[:, :MAX_PROMPT] for prompt in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not tokens.numel():
            raise BuildError(
                f"{what}: the prompt {prompt!r} has no tokens, so no row can be made of it. Write some text."
            )
    return ids


def _mean_inputs(
    network: Any,
    prompts: Sequence[torch.Tensor],
    watching: Callable[[_Add], AbstractContextManager[None]],
) -> Means:
    """Return the mean over prompts of each one's mean state, by layer; empty where there are no prompts.

    Args:
        network: A model.
        prompts: Ids of each, int64 ``(1, positions)``.
        watching: Makes the context in which the model shows its routers' inputs.
    """
    sums: Means = {}

    def add(layer: int, states: torch.Tensor) -> None:
        mean = states[0].float().mean(0) / len(prompts)
        sums[layer] = sums[layer] + mean if layer in sums else mean

    with watching(add), torch.no_grad():
        for ids in prompts:
            network(input_ids=ids.to(network.device), use_cache=False)
    return sums


def _forced_means(
    model: ComposedForCausalLM, prompts: Sequence[torch.Tensor], *, expert: int, branch: Branch
) -> Means:
    """Return the means while all tokens go to one expert."""

    def watching(add: _Add) -> AbstractContextManager[None]:
        def watch(layer: int, asked: Branch, states: torch.Tensor, mask: torch.Tensor | None) -> None:
            if asked == branch:
                add(layer, states)

        return _forced(expert, watch)

    return _mean_inputs(model, prompts, watching)


@contextmanager
def _hooked(network: Any, base: BaseDescription, branch: Branch, add: _Add) -> Iterator[None]:
    """Show what enters every FFN, or every attention, of the base model."""
    module = base.layout.module if branch == "ffn" else attention_module(base)

    def hook_of(layer: int) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            add(layer, args[0] if args else kwargs["hidden_states"])

        return hook

    handles = [
        network.get_submodule(f"{base.layers_prefix}.{layer}.{module}").register_forward_pre_hook(
            hook_of(layer), with_kwargs=True
        )
        for layer in range(base.num_layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _forced(expert: int, watch: Any) -> Iterator[None]:
    token = FORCED.set(Forced(expert=expert, watch=watch))
    try:
        yield
    finally:
        FORCED.reset(token)
