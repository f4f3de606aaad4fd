"""Merging experts into one dense model: weight averages, TIES and DARE, one tensor at a time.

Nothing is written, and bases that mergekit has no table for merge too. Knows nothing of how the merged model does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from composer import merging
from experts.errors import DataError, ManifestError
from pipelines.baselines.arm import DenseArm
from pipelines.baselines.dense import open_dense
from pipelines.evaluate import DomainWindows, measure

if TYPE_CHECKING:
    from pipelines.baselines.anchor import Anchor
    from pipelines.baselines.context import BaselineContext

__all__ = [
    "PUBLIC",
    "make_dare_ties",
    "make_soup",
    "make_ties",
    "make_weighted_soup",
    "merge_tensors",
    "validation_weights",
]

PUBLIC = "public"
"""Key of validation text that is nobody's."""


def merge_tensors(
    anchor: Anchor,
    experts: Mapping[str, Mapping[str, Tensor]],
    method: str,
    *,
    weights: Mapping[str, float],
    with_anchor: bool,
    seed: int = 0,
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merge experts' dense models; only tensors that some expert changes are computed.

    An expert that does not change a tensor takes part with the anchor's, as its whole dense checkpoint would.

    Args:
        anchor: The anchor.
        experts: Domain -> its dense tensors by name, in the order of the sums.
        method: One of mergekit's methods.
        weights: By domain.
        with_anchor: Whether the method takes differences to the anchor.
        seed: Of what the method draws at random, for each tensor apart.
        parameters: The method's others, by mergekit's names.

    Returns:
        By name, in the anchor's dtype and on its device.
    """
    merged = {}
    for name in sorted({name for tensors in experts.values() for name in tensors}):
        own = anchor.weight(name)
        result = merging.merge_tensors(
            {_key(domain): tensors.get(name, own) for domain, tensors in experts.items()},
            method=method,
            base=own if with_anchor else None,
            weights={_key(domain): weight for domain, weight in weights.items()},
            parameters={
                key: {_key(domain): v for domain, v in value.items()} if isinstance(value, Mapping) else value
                for key, value in parameters.items()
            },
            name=name,
            seed=seed,
        )
        merged[name] = result.to(own.device, own.dtype)
    return merged


def _key(domain: str) -> str:
    return f"domain {domain}"  # a domain may be called as the base is


def make_soup(context: BaselineContext) -> DenseArm:
    """Make the uniform average of the experts' weights: ``(1 / n) sum_j W_j``.

    Model soups (arXiv 2203.05482). With no expert it is the anchor.
    """
    return _soup(context, dict.fromkeys(context.domains, 1.0))


def make_weighted_soup(
    context: BaselineContext,
    *,
    weights: Mapping[str, float] | None = None,
    validation: Mapping[str, Tensor] | None = None,
    temperature: float = 1.0,
) -> DenseArm:
    """Make a weighted average of the experts' weights, ``sum_j w_j W_j / sum_j w_j``.

    Give either the weights or the text that they are measured on; see `validation_weights`.

    Args:
        context: Anchor and experts.
        weights: By domain, one for each expert; at least 0, not all 0.
        validation: Token ids ``(windows, length)`` by domain, or of ``public`` text alone.
        temperature: See `validation_weights`.

    Raises:
        ManifestError: Neither or both are given, or a weight is missing or not allowed.
        DataError: Validation text is missing.
    """
    if (weights is None) == (validation is None):
        raise ManifestError("A weighted soup needs either 'weights' or 'validation', and not both.")
    if weights is None:
        assert validation is not None
        weights = validation_weights(context, validation, temperature=temperature)
    return _soup(context, _checked_weights(context, weights))


def _checked_weights(context: BaselineContext, weights: Mapping[str, float]) -> dict[str, float]:
    for domain in weights:
        context.check_domain(domain)
    missing = [domain for domain in context.domains if domain not in weights]
    if missing:
        raise ManifestError(f"weights: none for {', '.join(missing)}. Give one for every expert.")
    values = {domain: float(weights[domain]) for domain in context.domains}
    fit = all(math.isfinite(value) and value >= 0 for value in values.values())
    if not fit or (values and not any(values.values())):
        raise ManifestError(
            f"weights: {values} found; every weight must be a number of at least 0, and one above 0."
        )
    return values


def _soup(context: BaselineContext, weights: Mapping[str, float]) -> DenseArm:
    anchor = context.anchor()
    used = {domain: tensors for domain, tensors in open_dense(context).items() if weights[domain]}
    merged = merge_tensors(
        anchor,
        used,
        "linear",
        weights={domain: weights[domain] for domain in used},
        with_anchor=False,
        normalize=True,
    )
    return DenseArm(anchor, merged)


def validation_weights(
    context: BaselineContext, validation: Mapping[str, Tensor], *, temperature: float = 1.0
) -> dict[str, float]:
    """Weigh each expert by its perplexity on validation text, relative to the anchor's on the same text.

    ``w_j ~ (ppl_anchor / ppl_j) ^ (1 / T)``, summing to 1, with ``log ppl`` the mean NLL in nats per token of a
    dense model. On public text all experts read the same, and the anchor cancels: shares of inverse perplexity. On
    own text each owner measures on held-out text of the own domain and hands over one number; the anchor takes out
    how hard that text is, which says nothing about the expert.

    Args:
        context: Anchor and experts.
        validation: Token ids int64 ``(windows, length)``: either ``{"public": ids}``, or ids for every domain.
        temperature: T; above 0. Smaller prefers the best expert more.

    Raises:
        DataError: Validation text is missing for an expert.
        ManifestError: The temperature is not above 0.
    """
    if not temperature > 0:
        raise ManifestError(f"temperature: {temperature} found; it must be above 0.")
    missing = [domain for domain in context.domains if domain not in validation]
    if missing and set(validation) != {PUBLIC}:
        raise DataError(
            f"validation: no text for {', '.join(missing)}. Give text for every expert's domain, or '{PUBLIC}' alone."
        )
    anchor = context.anchor()
    experts = open_dense(context)
    gains = []
    for domain, tensors in experts.items():
        ids = validation[PUBLIC if missing else domain]
        gains.append(_mean_nll(anchor, {}, ids) - _mean_nll(anchor, tensors, ids))
    shares = torch.softmax(torch.tensor(gains, dtype=torch.float64) / temperature, dim=0)
    return dict(zip(experts, shares.tolist(), strict=True))


def _mean_nll(anchor: Anchor, tensors: Mapping[str, Tensor], ids: Tensor) -> float:
    windows = {PUBLIC: DomainWindows(ids=ids, text_bytes=0)}
    return measure(nn.Identity(), windows, run=DenseArm(anchor, dict(tensors))).mean_nll


def make_ties(
    context: BaselineContext,
    *,
    density: float = 0.2,
    scale: float = 1.0,
    weights: Mapping[str, float] | None = None,
) -> DenseArm:
    """Make the TIES merge of the experts: trim, elect signs, average those that agree.

    arXiv 2306.01708; the defaults are the paper's for merging without validation data (top 20 %, scale 1).

    Args:
        context: Anchor and experts.
        density: Share of each difference's entries, the largest, that are kept; in (0, 1].
        scale: Factor of the merged difference (the paper's lambda).
        weights: By domain; None: all alike.

    Raises:
        ManifestError: A value is not allowed.
    """
    return _task_vectors(context, "ties", density=density, scale=scale, weights=weights, seed=0)


def make_dare_ties(
    context: BaselineContext,
    *,
    density: float = 0.5,
    scale: float = 1.0,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
) -> DenseArm:
    """Make the DARE-TIES merge of the experts: drop entries at random, rescale the rest, elect signs, average.

    arXiv 2311.03099 with the sign election of arXiv 2306.01708. mergekit rescales by the share of magnitude that
    was dropped rather than by ``1 / density``, and sums those that agree; here they are averaged, as TIES does.

    Args:
        context: Anchor and experts.
        density: Probability that an entry of a difference is kept; in (0, 1].
        scale: Factor of the merged difference.
        weights: By domain; None: all alike.
        seed: Of the draws. A tensor's draws depend on its name and on who is listed, not on other tensors.

    Raises:
        ManifestError: A value is not allowed.
    """
    return _task_vectors(context, "dare_ties", density=density, scale=scale, weights=weights, seed=seed)


def _task_vectors(
    context: BaselineContext,
    method: str,
    *,
    density: float,
    scale: float,
    weights: Mapping[str, float] | None,
    seed: int,
) -> DenseArm:
    if not 0 < density <= 1:
        raise ManifestError(f"density: {density} found; it must be above 0 and at most 1.")
    if not math.isfinite(scale):
        raise ManifestError(f"scale: {scale} found; it must be a finite number.")
    checked = _checked_weights(context, weights or dict.fromkeys(context.domains, 1.0))
    anchor = context.anchor()
    used = {domain: tensors for domain, tensors in open_dense(context).items() if checked[domain]}
    merged = merge_tensors(
        anchor,
        used,
        method,
        weights={domain: checked[domain] for domain in used},
        with_anchor=True,
        seed=seed,
        density=dict.fromkeys(used, density),
        normalize=True,
        **{"lambda": scale},
    )
    return DenseArm(anchor, merged)
