"""Branch-Train-Merge: experts stay apart, and their next-token probabilities are mixed by who predicted best so far.

``p(x_t | x_<t) = sum_j w_j(t) p_j(x_t | x_<t)``, ``w_j(t) ~ prior_j p_j(x_<t) ^ (1 / T)`` (arXiv 2208.03306,
section 3; sparse and tempered ensembles as in arXiv 2303.14177). Knows models by their logits only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, final

import torch
from torch import Tensor

from experts.errors import ManifestError
from experts.names import unknown_name
from pipelines.baselines.arm import Arm
from pipelines.baselines.dense import open_dense

if TYPE_CHECKING:
    from pipelines.baselines.anchor import Anchor
    from pipelines.baselines.context import BaselineContext

__all__ = ["ANCHOR", "BranchTrainMerge", "log_weights", "make", "mix", "token_log_likelihoods"]

ANCHOR = "anchor"
"""Name of the anchor among the members."""


def log_weights(
    token_log_likelihoods: Tensor,
    log_prior: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    prompt_tokens: int | None = None,
) -> Tensor:
    """Log-weights of the members at every position, from the tokens up to it.

    ``log w_j(t) = log prior_j + (1 / T) sum_{1 <= s <= t} log p_j(x_s | x_<s) - log-normaliser``; the sum ends at
    the prompt's last token where a prompt is set. Position 0 has the prior: nobody predicts the first token.

    Args:
        token_log_likelihoods: float32 ``(members, batch, length - 1)``: ``log p_j(x_s | x_<s)`` for s = 1, 2, ...
        log_prior: float32 ``(members,)``; -inf leaves a member out.
        temperature: T.
        top_k: Only so many members, the heaviest at each position, keep a weight; ties go to the first.
        prompt_tokens: Weights stay as they are after so many tokens; None: the whole history counts.

    Returns:
        float32 ``(members, batch, length)``; their exponentials sum to 1 over the members.
    """
    members, batch, _ = token_log_likelihoods.shape
    seen = token_log_likelihoods.double().cumsum(dim=-1) / temperature
    evidence = torch.cat([seen.new_zeros(members, batch, 1), seen], dim=-1)
    if prompt_tokens is not None:
        last = min(prompt_tokens, evidence.shape[-1]) - 1
        evidence[:, :, last:] = evidence[:, :, last : last + 1]
    joint = log_prior.double()[:, None, None] + evidence
    if top_k is not None and top_k < members:
        order = joint.argsort(dim=0, descending=True, stable=True)
        joint = joint.scatter(0, order[top_k:], -math.inf)
    return torch.log_softmax(joint, dim=0).float()


def mix(
    member_logits: Sequence[Tensor], weights: Tensor, *, of: Literal["probabilities", "logits"]
) -> Tensor:
    """Mix the members' predictions.

    Args:
        member_logits: One ``(batch, length, vocabulary)`` for each member.
        weights: Log-weights ``(members, batch, length)``.
        of: ``probabilities``: ``log sum_j w_j p_j``; ``logits``: ``sum_j w_j log p_j``, which a softmax normalises.

    Returns:
        float32 ``(batch, length, vocabulary)``. A member without weight at a position adds nothing there, whatever
        it predicts.
    """
    mixed: Tensor | None = None
    for logits, weight in zip(member_logits, weights, strict=True):
        log_p = torch.log_softmax(logits.float(), dim=-1)
        log_w = weight[..., None]
        if of == "probabilities":
            part = log_p + log_w
            mixed = part if mixed is None else torch.logaddexp(mixed, part)
        else:
            part = torch.where(log_w > -math.inf, log_p * log_w.exp(), torch.zeros_like(log_p))
            mixed = part if mixed is None else mixed + part
    assert mixed is not None, "at least one member"
    return mixed


@final
class BranchTrainMerge(Arm):
    """An ensemble of dense models.

    Every member runs on every window; the logits of all of them are in memory at once.

    Args:
        anchor: Runs the members.
        members: Name -> its tensors; the anchor's own are none.
        log_prior: float32 ``(members,)``.
        temperature: See `log_weights`.
        top_k: See `log_weights`.
        prompt_tokens: See `log_weights`.
        of: See `mix`.
    """

    def __init__(
        self,
        anchor: Anchor,
        members: Mapping[str, Mapping[str, Tensor]],
        *,
        log_prior: Tensor,
        temperature: float,
        top_k: int | None,
        prompt_tokens: int | None,
        of: Literal["probabilities", "logits"],
    ) -> None:
        self.anchor = anchor
        self.members = members
        self.log_prior = log_prior
        self.temperature = temperature
        self.top_k = top_k
        self.prompt_tokens = prompt_tokens
        self.of = of

    def logits(self, ids: Tensor, *, domain: str | None = None) -> Tensor:
        """Log-probabilities of the mixture, float32; see `Arm.logits`."""
        with torch.inference_mode():
            predicted = self._predictions(ids)
            return mix(predicted, self._log_weights(predicted, ids), of=self.of)

    def weights(self, ids: Tensor) -> dict[str, Tensor]:
        """What each member weighs at each position, float32 ``(batch, length)`` by name; they sum to 1."""
        with torch.inference_mode():
            found = self._log_weights(self._predictions(ids), ids).exp()
        return dict(zip(self.members, found, strict=True))

    def _predictions(self, ids: Tensor) -> list[Tensor]:
        return [self.anchor.logits(ids, tensors) for tensors in self.members.values()]

    def _log_weights(self, predicted: Sequence[Tensor], ids: Tensor) -> Tensor:
        targets = ids[:, 1:].to(self.anchor.device)
        return log_weights(
            torch.stack([token_log_likelihoods(logits, targets) for logits in predicted]),
            self.log_prior.to(self.anchor.device),
            temperature=self.temperature,
            top_k=self.top_k,
            prompt_tokens=self.prompt_tokens,
        )


def token_log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """``log p(target)`` from ``(batch, length, vocabulary)``; float32 ``(batch, length - 1)``, row by row."""
    rows = []
    for predicted, target in zip(logits, targets, strict=True):
        wide = predicted[:-1].float()
        rows.append(wide.gather(-1, target[:, None]).squeeze(-1) - wide.logsumexp(dim=-1))
    return torch.stack(rows)


def make(
    context: BaselineContext,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    anchor: bool = False,
    prior: Mapping[str, float] | None = None,
    prompt_tokens: int | None = None,
    of: Literal["probabilities", "logits"] = "probabilities",
) -> BranchTrainMerge:
    """Make the ensemble of all experts.

    Args:
        context: Anchor and experts.
        temperature: Above 0; the larger, the nearer the weights stay to the prior; ``inf`` keeps the prior.
        top_k: How many members keep a weight at a position, at least 1; None: all.
        anchor: Whether the anchor is a member, too.
        prior: By domain, and ``anchor``; None: all alike. It need not sum to 1.
        prompt_tokens: Weights stay as they are after so many tokens, at least 1; None: the whole history counts.
        of: What is mixed; the FlexOlmo paper's text says probabilities, its appendix logits.

    Raises:
        ManifestError: A value is not allowed, or there is no member.
        UnknownNameError: The prior names a domain that is not listed.
    """
    _check_options(temperature=temperature, top_k=top_k, prompt_tokens=prompt_tokens, of=of)
    runs = context.anchor()
    members: dict[str, Mapping[str, Tensor]] = {ANCHOR: {}} if anchor else {}
    members |= {domain: dict(tensors) for domain, tensors in open_dense(context).items()}
    if not members:
        raise ManifestError("An ensemble needs a member: list an expert, or set 'anchor'.")
    return BranchTrainMerge(
        runs,
        members,
        log_prior=_log_prior(prior, tuple(members)),
        temperature=temperature,
        top_k=top_k,
        prompt_tokens=prompt_tokens,
        of=of,
    )


def _check_options(*, temperature: float, top_k: int | None, prompt_tokens: int | None, of: str) -> None:
    if not temperature > 0:
        raise ManifestError(f"temperature: {temperature} found; it must be above 0.")
    for name, value in {"top_k": top_k, "prompt_tokens": prompt_tokens}.items():
        if value is not None and value < 1:
            raise ManifestError(f"{name}: {value} found; it must be at least 1, or left out.")
    if of not in ("probabilities", "logits"):
        raise ManifestError(f"of: '{of}' found; allowed: probabilities, logits.")


def _log_prior(prior: Mapping[str, float] | None, members: tuple[str, ...]) -> Tensor:
    given = dict.fromkeys(members, 1.0) if prior is None else prior
    for name in given:
        if name not in members:
            raise unknown_name("domain", name, members)
    values = torch.tensor([float(given.get(name, 0.0)) for name in members], dtype=torch.float64)
    if not bool((values > 0).all() and values.isfinite().all()):
        raise ManifestError(f"prior: {dict(given)} found; every member needs a number above 0.")
    return (values / values.sum()).log().float()
