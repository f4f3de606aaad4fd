"""Extraction: whether a model, given the beginning of a text, writes down the rest.

Knows token ids and any model that generates; knows nothing of canaries or owners' files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from composer.optout import owner_names

__all__ = ["EXTRACTED", "Case", "clopper_pearson", "continuations", "similarity"]

EXTRACTED = 0.9
"""Similarity from which a text counts as extracted: near-verbatim, as FlexOlmo's authors have it
(arXiv 2507.07024)."""

_SAMPLING = {"do_sample": True, "top_k": 50, "top_p": 0.95, "temperature": 1.0}
"""Theirs as well."""

_GREEDY = {"do_sample": False, "top_k": None, "top_p": None, "temperature": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A text, cut in two.

    Attributes:
        prefix: Ids that the model is given, at least one.
        target: Ids that it may know.
    """

    prefix: tuple[int, ...]
    target: tuple[int, ...]


def similarity(one: Sequence[int], other: Sequence[int]) -> float:
    """Return the normalised Levenshtein similarity ``1 - distance / longer length`` of two sequences of ids."""
    longer = max(len(one), len(other))
    return 1 - _distance(one, other) / longer if longer else 1.0


def _distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Fewest insertions, deletions and replacements that make ``one`` of ``other``."""
    previous = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        row = [i]
        for j, right in enumerate(other, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (left != right)))
        previous = row
    return previous[-1]


def continuations(
    model: Any,
    cases: Sequence[Case],
    *,
    opt_out: Collection[str] = (),
    samples: int = 0,
    seed: int = 0,
    batch_size: int = 16,
) -> list[float]:
    """Return, for each case, the best similarity of what the model writes to the target.

    Args:
        model: A composed model.
        cases: As many tokens are generated as the target has.
        opt_out: Owners left out by request.
        samples: Continuations drawn of each (top-k 50, top-p 0.95, temperature 1); 0: the greedy one.
        seed: Of the draws.
        batch_size: Rows generated at once.

    Raises:
        OptOutError: ``opt_out`` is no collection of names.
    """
    names = owner_names(opt_out)
    best = [0.0] * len(cases)
    rows: dict[tuple[int, int], list[int]] = {}
    for number, case in enumerate(cases):  # rows of one shape need no padding
        rows.setdefault((len(case.prefix), len(case.target)), []).extend([number] * max(1, samples))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for (_, length), numbers in rows.items():
            for start in range(0, len(numbers), batch_size):
                part = numbers[start : start + batch_size]
                written = _generate(model, [cases[n].prefix for n in part], length, names, samples > 0)
                for number, ids in zip(part, written, strict=True):
                    best[number] = max(best[number], similarity(ids, cases[number].target))
    return best


def _generate(
    model: Any, prefixes: Sequence[Sequence[int]], length: int, opt_out: frozenset[str], draw: bool
) -> list[list[int]]:
    ids = torch.tensor(prefixes, device=model.device)
    end = model.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or ())
    with torch.inference_mode():
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            pad_token_id=min(ends, default=0),
            opt_out=opt_out,
            **(_SAMPLING if draw else _GREEDY),
        )[:, ids.shape[1] :]
    return [_until(row, ends) for row in written.tolist()]


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """What comes before the end of the text; what follows it is padding."""
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def clopper_pearson(hits: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a binomial proportion (Clopper and Pearson 1934)."""
    tail = (1 - confidence) / 2
    # P(X >= hits) grows with p and P(X <= hits) falls: find where each is the tail
    low = 0.0 if hits == 0 else _root(lambda p: _at_least(hits, trials, p) - tail)
    high = 1.0 if hits == trials else _root(lambda p: tail - (1 - _at_least(hits + 1, trials, p)))
    return low, high


def _at_least(hits: int, trials: int, p: float) -> float:
    ways = (
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(p) + (trials - k) * math.log1p(-p)
        for k in range(hits, trials + 1)
    )  # fmt: skip
    return math.fsum(map(math.exp, ways))


def _root(rising: Callable[[float], float]) -> float:
    """Where a rising function passes zero between 0 and 1."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2
