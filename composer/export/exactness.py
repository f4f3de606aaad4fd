"""Whether a composition is exactly a stock class's model, and every reason why it is not.

Knows the lock, the cards, published rows and tuned biases; opens no weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from composer.export import TARGETS
from composer.export.seats import SEATED, Seat
from composer.export.target import ANCHOR
from composer.export.tensors import floats
from composer.export.tuned import TunedTensors
from composer.manifest import RouterSpec
from composer.recipes import RECIPES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from composer.export.target import StockTarget
    from composer.members import Member, Members
    from experts.base import BaseDescription

__all__ = ["LINEAR", "Rows", "Verdict", "judge", "read_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Router rows of one expert, or of the public anchor.

    Attributes:
        weights: Layer -> float32 ``(d,)``.
        biases: Layer -> ``min(b, 0)``, only where it is not 0.
    """

    weights: Mapping[int, NDArray[np.float32]]
    biases: Mapping[int, float]


def read_rows(members: Members) -> dict[int, Rows]:
    """Read the rows of the anchor (id 0) and of every member that publishes any; one file at a time is in memory."""
    width = members.description.hidden_size
    found = {}
    if members.lock.base.routing is not None:
        found[ANCHOR] = _rows(members.public())
    for member in members.experts:
        if member.card.routing is not None:
            found[member.id] = _rows(member.routing(width))
    return found


def _rows(artifacts: object) -> Rows:
    from experts.routing_artifacts import RoutingArtifacts

    assert isinstance(artifacts, RoutingArtifacts)
    weights, biases = {}, {}
    for layer in artifacts.info.rows.layers if artifacts.info.rows else ():
        weight, bias = artifacts.row(layer)
        weights[layer] = weight.astype("float32")  # a copy: the file's other tensors are let go
        if bias is not None and float(bias[0]) < 0:
            biases[layer] = float(bias[0])
    return Rows(weights=weights, biases=biases)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What stands between a composition and its stock form.

    Attributes:
        problems: Every reason why it cannot be written, each with what would help; empty when it can.
        densified: What is written in full although the composition stores less.
        dropped: Biases that are left out, so that the logits are others.
        dense: Layers in which the stock class keeps the anchor's plain FFN.
    """

    problems: tuple[str, ...]
    densified: tuple[str, ...]
    dropped: tuple[str, ...]
    dense: tuple[int, ...]


def judge(
    name: str,
    target: StockTarget,
    members: Members,
    rows: Mapping[int, Rows],
    *,
    seats: Sequence[Seat],
    tuned: TunedTensors,
    densify: bool,
    drop_bias: bool = False,
) -> Verdict:
    """Compare a composition with what a stock class can compute.

    Args:
        name: The target's name in `TARGETS`.
        target: The stock class.
        members: The experts that are exported.
        rows: What `read_rows` returned.
        seats: Who stands at which index.
        tuned: What was tuned after composing.
        densify: Whether low-rank experts may be written in full, and absent ones as copies of the anchor.
        drop_bias: Whether the owners' biases may be left out, which changes the logits.
    """
    lock = members.lock
    problems = _base_problems(name, target, members) + _recipe_problems(lock.recipe)
    if RECIPES.load(lock.recipe).routes:
        problems += _router_problems(target, lock.router, len(seats))
    biases = _bias_findings(members, rows) if lock.tuned is None else _tuned_biases(members, tuned)
    if not drop_bias:
        problems += [
            f"{text}, and stock gates have none and would ignore it; --calibrate drops it and measures what that costs"
            for text in biases
        ]
    densified: list[str] = []
    ranks, layers = _rank_findings(members), _layer_findings(target, members)
    if densify:
        densified = [*ranks, *layers.fillable]
    else:
        problems += [f"{text}; --densify writes it in full" for text in ranks]
        problems += [f"{text}; --densify does it" for text in layers.fillable]
    return Verdict(
        problems=(*problems, *layers.hopeless),
        densified=tuple(densified),
        dropped=tuple(biases) if drop_bias else (),
        dense=layers.dense,
    )


def _base_problems(name: str, target: StockTarget, members: Members) -> list[str]:
    description = members.description
    family = description.config.get("model_type")
    if family not in target.families:
        fitting = [other for other in TARGETS if other != name and _fits(TARGETS.load(other)(), description)]
        advice = (
            f"; use --to {fitting[0]}" if fitting else "; no stock class that is known here has its blocks"
        )
        exact = f"{' and '.join(target.families)}{target.condition}"
        return [f"the base is of the family '{family}', {target.title} is exact for {exact}{advice}"]
    ffn = {
        f"{linear.name}.weight"
        for layer in range(description.num_layers)
        for linear in description.ffn_linears(layer).values()
    }
    misfits = target.misfits(tensor for tensor in description.tensors if tensor not in ffn)
    found = [f"{target.title} has no place for the base's tensors {_listed(misfits)}"] if misfits else []
    return found + target.setting_problems(description.config)


def _fits(target: StockTarget, base: BaseDescription) -> bool:
    return base.config.get("model_type") in target.families and not target.setting_problems(base.config)


def _recipe_problems(recipe: str) -> list[str]:
    if recipe in SEATED:
        return []
    if recipe == "bam":
        return ["recipe 'bam': it has attention experts, and no stock class does; compose with recipe `btx`"]
    if recipe in ("merge", "soup"):
        return [
            f"recipe '{recipe}': its result is one dense model of the base's own class, no mixture; "
            "`composer.load(FOLDER).base.save_pretrained(OUT)` writes it"
        ]
    return [f"recipe '{recipe}': only compositions of the recipes {', '.join(SEATED)} have a stock form"]


LINEAR = ("learned", "random", "prompts")
"""Scorers that multiply with a row per expert and layer, and do nothing else."""


def _router_problems(target: StockTarget, router: RouterSpec, seats: int) -> list[str]:
    found = []
    if router.scorer not in LINEAR:
        found.append(
            f"the scorer '{router.scorer}' has no stock form, stock gates multiply with one row per expert and layer; "
            "compose with `scorer: learned`"
        )
    if router.context != "token":
        found.append(
            f"the context '{router.context}' has no stock form, stock gates look at one token; compose with "
            "`context: token`"
        )
    if router.selector != "topk":
        found.append(
            f"the selector '{router.selector}' has no stock form, stock gates take a fixed number of experts; compose "
            "with `selector: topk`"
        )
    if target.always_normalizes and not router.normalize and router.top_k < seats:
        found.append(
            f"{target.title} lets the chosen weights sum to 1 and the composition does not; compose with "
            "`normalize: true`"
        )
    return found


def _bias_findings(members: Members, rows: Mapping[int, Rows]) -> list[str]:
    router = members.lock.router
    if router.scorer != "learned" or router.options.get("bias", True) is False:
        return []
    found = []
    for member in members.experts:
        biases = rows[member.id].biases if member.id in rows else {}
        used = [biases[layer] for layer in member.card.layers if layer in biases]
        if used:
            span = f"{min(used):g}" if min(used) == max(used) else f"{min(used):g} to {max(used):g}"
            found.append(f"{member.locked.name} has a negative router bias ({span})")
    return found


def _tuned_biases(members: Members, tuned: TunedTensors) -> list[str]:
    """Say which layers have tuned biases below 0, the anchor's apart, which counts as 0."""
    used = {}
    for layer in range(members.description.num_layers):
        stored = tuned.biases(layer)
        if stored is not None and (lowest := float(floats(stored)[1:].min())) < 0:
            used[layer] = lowest
    if not used:
        return []
    return [
        f"the tuned routers of layers {_ranges(used)} have negative biases (down to {min(used.values()):g})"
    ]


def _rank_findings(members: Members) -> list[str]:
    return [
        f"{member.locked.name} is low-rank (at most {member.card.rank})"
        for member in members.experts
        if member.card.kind == "lora"
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layers:
    dense: tuple[int, ...]
    fillable: tuple[str, ...]
    hopeless: tuple[str, ...]


def _layer_findings(target: StockTarget, members: Members) -> _Layers:
    """Sort the layers that lack experts by what can be done about them.

    Where no expert is present, n copies of the anchor are the anchor if the weights sum to 1. Where some are, a
    copy of the anchor with the anchor's row changes nothing only if one expert is chosen: with two, both of them
    could be the anchor's.
    """
    router, experts = members.lock.router, members.experts
    without = _layers_without(members)
    empty = tuple(layer for layer, lacking in without.items() if len(lacking) == len(experts))
    partial = [(layer, lacking) for layer, lacking in without.items() if layer not in empty]
    fillable, hopeless = [], []
    dense: tuple[int, ...] = ()
    if empty and target.dense_layers:
        dense = empty
    elif empty and (router.normalize or router.top_k > len(experts)):
        fillable.append(f"layers {_ranges(empty)} have no experts and need copies of the anchor")
    elif empty:
        hopeless.append(
            f"layers {_ranges(empty)} have no experts, and copies of the anchor stand for it only where weights sum "
            "to 1; compose with `normalize: true`"
        )
    for lacking in sorted({names for _, names in partial}):
        layers = _ranges([layer for layer, names in partial if names == lacking])
        text = f"layers {layers} lack {', '.join(lacking)}, and a stock gate routes to every expert in every layer"
        if router.top_k == 1 and router.normalize:
            fillable.append(f"{text}, which a copy of the anchor with its row answers")
        else:
            hopeless.append(
                f"{text}; a copy of the anchor is exact with `top_k: 1` and `normalize: true` only, so compose experts "
                "of the same layers"
            )
    return _Layers(dense=dense, fillable=tuple(fillable), hopeless=tuple(hopeless))


def _layers_without(members: Members) -> dict[int, tuple[str, ...]]:
    def lacking(layer: int) -> Sequence[Member]:
        return [member for member in members.experts if layer not in member.card.layers]

    every = range(members.description.num_layers)
    return {layer: tuple(m.locked.name for m in found) for layer in every if (found := lacking(layer))}


def _ranges(layers: Collection[int]) -> str:
    """Write ``0-3, 7`` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
