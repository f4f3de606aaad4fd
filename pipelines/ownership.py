"""Says whose a domain of text is, and how much of it the router sends there.

Knows a composition's lock and shares by owner; knows nothing of models or text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from statistics import fmean

from composer.lock import Lock
from composer.trace import ANCHOR_NAME
from experts.names import unknown_name

__all__ = ["domain_owners", "mean_accuracy", "routing_accuracy"]


def domain_owners(
    lock: Lock, domains: Collection[str], *, given: Mapping[str, Collection[str]] | None = None
) -> dict[str, tuple[str, ...]]:
    """Return the owners of each domain: those with an expert whose card names it, unless ``given`` says otherwise.

    Args:
        lock: Of the composed folder.
        domains: Names of the domains that are measured.
        given: Owners by domain, for domains that the cards call otherwise; ``anchor`` stands for text that is
            nobody's.

    Returns:
        Sorted owners by domain; empty where nobody has an expert for it.

    Raises:
        UnknownNameError: ``given`` names a domain that is not measured, or somebody without an expert.
    """
    given = given or {}
    known = [*lock.owners, ANCHOR_NAME]
    for domain, owners in given.items():
        if domain not in domains:
            raise unknown_name("domain", domain, domains)
        for owner in owners:
            if owner not in known:
                raise unknown_name("owner", owner, known)
    return {
        domain: tuple(
            sorted(
                given[domain] if domain in given else {e.owner for e in lock.experts if e.domain == domain}
            )
        )
        for domain in domains
    }


def routing_accuracy(sent: Mapping[str, float], owners: Collection[str]) -> float | None:
    """Return the share of a domain's tokens that are sent to one of its owners.

    Args:
        sent: Share of the tokens by owner, ``anchor`` among them; see `composer.trace.RoutingTrace.sent`.
        owners: The domain's. Who is not in the model gets nothing.

    Returns:
        Between 0 and 1, or None where none of the owners is in the model.
    """
    present = [owner for owner in owners if owner in sent]
    return sum(sent[owner] for owner in present) if present else None


def mean_accuracy(accuracies: Mapping[str, float | None]) -> float | None:
    """Return the mean over the domains that have an owner in the model, or None where no domain has."""
    values = [value for value in accuracies.values() if value is not None]
    return fmean(values) if values else None
