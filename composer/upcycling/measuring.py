"""What routers read while all tokens go to one expert: for rows made of prompts, and for owners' statistics.

Runs the composed model with forced routing, so the states are those of the expert's own path. Knows models and texts;
knows nothing of how a router is solved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from composer.forward import FORCED, Branch, Forced
from composer.routing.router import Router
from composer.routing.scorers.prompts import PromptScorer
from composer.routing.types import ANCHOR
from experts.routing_artifacts import InputsInfo, RoutingArtifacts, RoutingInfo, Statistics

if TYPE_CHECKING:
    from composer.members import Members
    from composer.model import ComposedForCausalLM

__all__ = ["fill_prompt_rows", "inputs_artifacts", "router_inputs"]

MAX_PROMPT = 512
"""Longest prompt, tokens; what follows is not read."""

Inputs = dict[tuple[Branch, int], Statistics]


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


def fill_prompt_rows(model: ComposedForCausalLM, members: Members, *, branch: Branch) -> None:
    """Fill in the rows of every `PromptScorer` of one branch.

    Args:
        model: Fully assembled but for these rows.
        members: Whose prompts are read, with the tokenizer of their folder.
        branch: Whose routers are filled in.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(members.folder, local_files_only=True)
    scorers = {layer: router.scorer for layer, router in _routers(model, branch)}
    public = _mean_inputs(model, tokenizer, members.lock.router.public_prompts, ANCHOR, branch)
    for member in members.experts:
        positive = _mean_inputs(model, tokenizer, member.locked.positive_prompts, member.id, branch)
        negative = _mean_inputs(model, tokenizer, member.locked.negative_prompts, member.id, branch)
        for layer, scorer in scorers.items():
            direction = positive[layer]
            for other in (negative, public):
                direction = direction - other[layer] if other else direction
            assert isinstance(scorer, PromptScorer)
            scorer.set_row(member.id, direction)


def _routers(model: ComposedForCausalLM, branch: Branch) -> Iterator[tuple[int, Router]]:
    from composer.layers.moa import MoALayer
    from composer.layers.moe import MoELayer

    kind = MoELayer if branch == "ffn" else MoALayer
    for module in model.modules():
        if isinstance(module, kind) and module.router is not None:
            yield module.layer, module.router


def _mean_inputs(
    model: ComposedForCausalLM, tokenizer: Any, prompts: Sequence[str], expert: int, branch: Branch
) -> dict[int, torch.Tensor]:
    """Return the mean over prompts of each one's mean state, by layer; empty where there are no prompts."""
    sums: dict[int, torch.Tensor] = {}

    def watch(layer: int, asked: Branch, states: torch.Tensor, mask: torch.Tensor | None) -> None:
        if asked == branch:
            mean = states[0].float().mean(0) / len(prompts)
            sums[layer] = sums[layer] + mean if layer in sums else mean

    with _forced(expert, watch), torch.no_grad():
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt").input_ids[:, :MAX_PROMPT]
            model(ids.to(model.device), use_cache=False)
    return sums


@contextmanager
def _forced(expert: int, watch: Any) -> Iterator[None]:
    token = FORCED.set(Forced(expert=expert, watch=watch))
    try:
        yield
    finally:
        FORCED.reset(token)
