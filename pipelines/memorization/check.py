"""Checks a composed model for memorised text, whole, without each owner, and as the anchor alone.

Knows the model's owners and tokenizer; the measures are those of ``exposure`` and ``extraction``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch.nn import functional as F

from composer.optout import owner_names
from experts.errors import DataError
from experts.names import unknown_name
from pipelines.memorization.canaries import Canary
from pipelines.memorization.exposure import estimated_exposure, ranked_exposure
from pipelines.memorization.extraction import EXTRACTED, Case, clopper_pearson, continuations

__all__ = [
    "ArmReport",
    "CanaryScore",
    "Checks",
    "arms_of",
    "canary_cases",
    "check",
    "sequence_losses",
    "text_cases",
]

_SHORT_PREFIX = 8
"""Tokens of a canary that is all secret from which its rest is asked for."""

Progress = Callable[[int, int], None]
"""Called with the steps done so far and in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryScore:
    """One canary under one set of owners.

    Attributes:
        exposure: Bits, by rank among the references.
        ceiling: What ``exposure`` cannot exceed: ``log2(references + 1)``.
        estimated: Bits, by a distribution fitted to the references' losses; None where they do not vary.
        similarity: Of the greedy continuation of the text before the secret to the secret, between 0 and 1.
    """

    exposure: float
    ceiling: float
    estimated: float | None
    similarity: float

    @property
    def extracted(self) -> bool:
        """Whether the model writes the secret down, near-verbatim."""
        return self.similarity >= EXTRACTED


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmReport:
    """What a set of owners has memorised.

    Attributes:
        opt_out: Owners left out by request.
        canaries: In the order of the file.
        similarities: Of the continuation of each text to what really follows.
    """

    opt_out: tuple[str, ...]
    canaries: tuple[CanaryScore, ...] = ()
    similarities: tuple[float, ...] = ()

    @property
    def mean_exposure(self) -> float | None:
        """Mean over the canaries, in bits; chance is about 1.44."""
        return fmean(score.exposure for score in self.canaries) if self.canaries else None

    @property
    def extracted(self) -> int:
        """How many texts were extracted."""
        return sum(value >= EXTRACTED for value in self.similarities)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        row: dict[str, Any] = {"opt_out": list(self.opt_out)}
        if self.canaries:
            row["mean_exposure"] = self.mean_exposure
            row["canaries"] = [{**asdict(score), "extracted": score.extracted} for score in self.canaries]
        if self.similarities:
            trials = len(self.similarities)
            row["extraction"] = {
                "texts": trials,
                "extracted": self.extracted,
                "rate": self.extracted / trials,
                "interval": list(clopper_pearson(self.extracted, trials)),
                "similarities": list(self.similarities),
            }
        return row


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """What is looked for, and how hard.

    Attributes:
        canaries: Planted ones.
        references: Other secrets that each canary is ranked among.
        texts: What may be extracted, see `text_cases`.
        samples: Continuations drawn of each text; 0: the greedy one.
        seed: Of references and draws.
        batch_size: Rows run at once.
    """

    canaries: Sequence[Canary] = ()
    references: int = 255
    texts: Sequence[Case] = ()
    samples: int = 0
    seed: int = 0
    batch_size: int = 16


def arms_of(owners: Sequence[str], *, without: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Return who is left out in each arm: nobody, each owner (or those named) in turn, everybody.

    Raises:
        UnknownNameError: ``without`` names somebody who is not in the model.
    """
    for owner in without:
        if owner not in owners:
            raise unknown_name("owner", owner, owners)
    alone = {f"composed-without:{owner}": (owner,) for owner in without or owners}
    return {"composed": (), **alone, "anchor": tuple(owners)}


def text_cases(documents: Sequence[str], tokenizer: Any, *, prefix: int, new: int, limit: int) -> list[Case]:
    """Cut the beginnings of documents: ``prefix`` tokens to be given, ``new`` tokens to be known.

    Args:
        documents: Training text.
        tokenizer: The model's.
        prefix: Tokens given.
        new: Tokens asked for.
        limit: At most this many documents, evenly from all over them.

    Raises:
        DataError: No document is long enough.
    """
    ids = [tokenizer(text, truncation=True, max_length=prefix + new).input_ids for text in documents]
    long = [row for row in ids if len(row) >= prefix + new]
    if not long:
        raise DataError(
            f"No document has {prefix + new} tokens ({prefix} to be given and {new} to be asked for); the longest "
            f"has {max(map(len, ids), default=0)}. Give longer ones, or smaller numbers."
        )
    step = max(1.0, len(long) / limit)
    chosen = [long[int(i * step)] for i in range(min(limit, len(long)))]
    return [Case(prefix=tuple(row[:prefix]), target=tuple(row[prefix : prefix + new])) for row in chosen]


def canary_cases(canaries: Sequence[Canary], tokenizer: Any) -> list[Case]:
    """Cut each canary's ids where its secret begins and ends.

    A token that holds the secret's first character belongs to the secret. Of a canary that begins with its secret,
    the first 8 tokens are given, or half of them if they are fewer than 16.

    Raises:
        DataError: A canary has a single token.
    """
    cases = []
    for number, canary in enumerate(canaries, 1):
        ids = list(tokenizer(canary.text).input_ids)
        if len(ids) < 2:
            raise DataError(f"Canary {number} is a single token, of which nothing can be asked.")
        start = min(_shared(ids, tokenizer(canary.prefix).input_ids if canary.prefix else []), len(ids) - 1)
        start = start or min(_SHORT_PREFIX, len(ids) // 2)
        end = max(start + 1, _shared(ids, tokenizer(canary.through_secret).input_ids))
        cases.append(Case(prefix=tuple(ids[:start]), target=tuple(ids[start:end])))
    return cases


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def sequence_losses(
    model: Any, rows: Sequence[Sequence[int]], *, opt_out: Collection[str] = (), batch_size: int = 16
) -> list[float]:
    """Return ``-sum log p(id[t+1] | id[..t])`` of each row in nats, whatever the rows' lengths."""
    names = owner_names(opt_out)
    losses = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        longest = max(len(rows[i]) for i in part)
        ids = torch.zeros(len(part), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, i in enumerate(part):
            ids[place, : len(rows[i])] = torch.tensor(rows[i])
            mask[place, : len(rows[i])] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        with torch.inference_mode():
            logits = model(ids, attention_mask=mask, use_cache=False, opt_out=names).logits
            for place, i in enumerate(part):
                length = len(rows[i])
                losses[i] = float(
                    F.cross_entropy(
                        logits[place, : length - 1].float(), ids[place, 1:length], reduction="sum"
                    )
                )
    return losses


def check(
    model: Any,
    tokenizer: Any,
    checks: Checks,
    *,
    arms: Mapping[str, Collection[str]],
    progress: Progress | None = None,
) -> dict[str, ArmReport]:
    """Look for memorised text with each arm's owners left out by request.

    Args:
        model: A composed model, in eval mode.
        tokenizer: Its tokenizer.
        checks: What is looked for.
        arms: Owners left out, by arm; see `arms_of`.
        progress: Told how many canaries and arms are done.

    Raises:
        DataError: There is nothing to look for, or a canary is too short.
        OptOutError: What an arm leaves out is no collection of names.
    """
    arms = {arm: owner_names(out) for arm, out in arms.items()}
    if not checks.canaries and not checks.texts:
        raise DataError("There is nothing to look for. Give canaries, training text, or both.")
    cases = canary_cases(checks.canaries, tokenizer)
    ranked = [
        [tokenizer(text).input_ids for text in (c.text, *c.references(checks.references, seed=checks.seed))]
        for c in checks.canaries
    ]
    steps = _Steps(progress, len(arms) * (len(ranked) + bool(checks.texts)))
    return {
        arm: ArmReport(
            opt_out=tuple(sorted(out)),
            canaries=tuple(_score_canaries(model, checks, ranked, cases, out, steps)),
            similarities=tuple(_extract(model, checks, out, steps)),
        )
        for arm, out in arms.items()
    }


class _Steps:
    """Counts what is done."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _score_canaries(
    model: Any,
    checks: Checks,
    ranked: Sequence[Sequence[Sequence[int]]],
    cases: Sequence[Case],
    opt_out: Collection[str],
    done: Callable[[], None],
) -> Iterator[CanaryScore]:
    near = continuations(model, cases, opt_out=opt_out, batch_size=checks.batch_size)
    for canary, rows, similar in zip(checks.canaries, ranked, near, strict=True):
        own, *others = sequence_losses(model, rows, opt_out=opt_out, batch_size=checks.batch_size)
        yield CanaryScore(
            exposure=ranked_exposure(own, others),
            ceiling=ranked_exposure(float("-inf"), others),
            estimated=estimated_exposure(own, others, space_bits=canary.space_bits),
            similarity=similar,
        )
        done()


def _extract(
    model: Any, checks: Checks, opt_out: Collection[str], done: Callable[[], None]
) -> Iterator[float]:
    if not checks.texts:
        return
    yield from continuations(
        model,
        checks.texts,
        opt_out=opt_out,
        samples=checks.samples,
        seed=checks.seed,
        batch_size=checks.batch_size,
    )
    done()
