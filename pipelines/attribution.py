"""Says what each owner contributes to a request: routed weight, leave-one-out and exact Shapley values.

Knows a composed model, token ids and sets of owners; knows nothing of files or terminals.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import factorial
from typing import TYPE_CHECKING, Any, Literal, get_args

from experts.errors import CoterieError

if TYPE_CHECKING:
    import torch

    from composer.model import ComposedForCausalLM

__all__ = [
    "MAX_SHAPLEY_OWNERS",
    "METHODS",
    "Attribution",
    "AttributionError",
    "Method",
    "attribute",
    "log_likelihoods",
    "shapley",
    "tokenize",
]

Method = Literal["mass", "leave-one-out", "shapley"]
METHODS: tuple[Method, ...] = get_args(Method)

MAX_SHAPLEY_OWNERS = 8
"""Exact Shapley values take a row of the model for every subset of the owners: 256 for 8."""

MAX_ROWS = 64
MAX_LOGIT_BYTES = 512 << 20
"""Of one batch, to choose how many sets are run at once."""

Owners = frozenset[str]
Progress = Callable[[int, int], None]
"""Called with the sets of owners done so far and in all."""


class AttributionError(CoterieError):
    """A request that cannot be attributed as asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """What each owner contributes to one request.

    Attributes:
        owners: Those in the model, sorted.
        tokens: Tokens whose log-likelihood is attributed.
        with_all: Their log-likelihood with every owner, in nats.
        with_none: The same with the anchor alone.
        mass: Share of the routed weight of ``anchor`` and of each owner over all tokens that the model read; or None.
        leave_one_out: ``v(all) - v(all without the owner)`` by owner, in nats; or None.
        shapley: Shapley value by owner, in nats; they sum to ``with_all - with_none``; or None.
    """

    owners: tuple[str, ...]
    tokens: int
    with_all: float
    with_none: float
    mass: Mapping[str, float] | None = None
    leave_one_out: Mapping[str, float] | None = None
    shapley: Mapping[str, float] | None = None


def tokenize(tokenizer: Any, prompt: str, continuation: str | None) -> tuple[list[int], int]:
    """Return the ids of a request and how many of them are given, that is, not attributed.

    The continuation is encoded by itself, so that the prompt's ids do not depend on it. Without one, the prompt is
    attributed from its second token on.

    Raises:
        AttributionError: Nothing is given, or nothing is left to be attributed.
    """
    ids: list[int] = list(tokenizer(prompt).input_ids)
    if continuation is None:
        if len(ids) < 2:
            raise AttributionError(
                f"The prompt has {len(ids)} tokens, and the first one is only given. Give a longer prompt, or a "
                "continuation."
            )
        return ids, 1
    further = list(tokenizer(continuation, add_special_tokens=False).input_ids)
    if not ids or not further:
        what = "continuation" if ids else "prompt"
        raise AttributionError(f"The {what} is empty. Give at least one character.")
    return ids + further, len(ids)


def attribute(
    model: ComposedForCausalLM,
    ids: Sequence[int],
    given: int,
    *,
    methods: Collection[Method] = METHODS,
    progress: Progress | None = None,
) -> Attribution:
    """Attribute the log-likelihood of ``ids[given:]`` after ``ids[:given]`` to the owners in a model.

    Sets of owners are what a request may ask for: ``v(S)`` is the log-likelihood with every owner outside ``S``
    opted out. The anchor is in every set and gets no share of the gain.

    Args:
        model: Composed, in eval mode, on any device.
        ids: The request.
        given: How many ids, at least one, are given.
        methods: ``mass``: share of the routed weight. ``leave-one-out``: what is lost without the owner.
            ``shapley``: the owner's mean gain over all orders in which owners can join.
        progress: Told how many sets of owners are done.

    Raises:
        AttributionError: The model has no owners, or more than `MAX_SHAPLEY_OWNERS` for Shapley values.
    """
    owners = model.owners
    if not owners:
        raise AttributionError("This model has no owners left, so there is nobody to attribute to.")
    if "shapley" in methods and len(owners) > MAX_SHAPLEY_OWNERS:
        raise AttributionError(
            f"Exact Shapley values run the model for every subset of the owners, here {2 ** len(owners)} for "
            f"{len(owners)} owners; at most {MAX_SHAPLEY_OWNERS} owners are allowed. Leave owners out, or use the "
            "methods mass and leave-one-out."
        )
    every = frozenset(owners)
    sets = [every, frozenset[str]()]
    if "leave-one-out" in methods:
        sets += [every - {owner} for owner in owners]
    if "shapley" in methods:
        sets += subsets(owners)
    value = log_likelihoods(model, ids, given, sets, progress=progress)
    return Attribution(
        owners=owners,
        tokens=len(ids) - given,
        with_all=value[every],
        with_none=value[frozenset()],
        mass=_mass(model, ids) if "mass" in methods else None,
        leave_one_out={owner: value[every] - value[every - {owner}] for owner in owners}
        if "leave-one-out" in methods
        else None,
        shapley=shapley(value, owners) if "shapley" in methods else None,
    )


def subsets(owners: Iterable[str]) -> list[Owners]:
    """Return all ``2^n`` subsets, small ones first."""
    names = list(owners)
    return [frozenset(some) for size in range(len(names) + 1) for some in combinations(names, size)]


def shapley(value: Mapping[Owners, float], owners: Collection[str]) -> dict[str, float]:
    """Return the exact Shapley values of a game (Shapley 1953).

    ``phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! * (v(S + i) - v(S))``

    Args:
        value: ``v`` of every subset of ``owners``.
        owners: The players.
    """
    n = len(owners)
    values = {}
    for owner in owners:
        others = [other for other in owners if other != owner]
        values[owner] = sum(
            factorial(len(some)) * factorial(n - len(some) - 1) / factorial(n)
            * (value[some | {owner}] - value[some])
            for some in subsets(others)
        )  # fmt: skip
    return values


def log_likelihoods(
    model: ComposedForCausalLM,
    ids: Sequence[int],
    given: int,
    sets: Iterable[Owners],
    *,
    progress: Progress | None = None,
) -> dict[Owners, float]:
    """Return the log-likelihood of ``ids[given:]`` in nats for each set of owners.

    The sets are rows of one batch, or of as few batches as memory allows; each row has its own opt-outs.

    Args:
        model: Composed, in eval mode.
        ids: The request.
        given: How many ids, at least one, are given.
        sets: Owners that are in; everybody else in the model is left out.
        progress: Told how many sets are done.
    """
    import torch

    distinct = list(dict.fromkeys(sets))
    row = torch.tensor(ids, device=model.device)
    targets, kept = row[given:], len(ids) - given
    size = max(1, min(MAX_ROWS, MAX_LOGIT_BYTES // (8 * kept * model.config.get_text_config().vocab_size)))
    results: dict[Owners, float] = {}
    for start in range(0, len(distinct), size):
        part = distinct[start : start + size]
        opt_out = [set(model.owners) - inside for inside in part]
        with torch.inference_mode():
            output = model(
                row[:-1].expand(len(part), -1), use_cache=False, logits_to_keep=kept, opt_out=opt_out
            )
        results |= zip(part, _summed(output.logits, targets), strict=True)
        if progress is not None:
            progress(len(results), len(distinct))
    return results


def _summed(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """Sum of ``log p(target)`` of each row, in float64; row by row, to save memory."""
    import torch

    return [
        float(torch.log_softmax(row.float(), dim=-1).gather(1, targets.unsqueeze(1)).double().sum())
        for row in logits
    ]


def _mass(model: ComposedForCausalLM, ids: Sequence[int]) -> dict[str, float]:
    import torch

    from composer.trace import RoutingTrace

    with RoutingTrace(model) as trace, torch.inference_mode():
        model(torch.tensor([ids[:-1]], device=model.device), use_cache=False, logits_to_keep=1)
    return trace.mass()
