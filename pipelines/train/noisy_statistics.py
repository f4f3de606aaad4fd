"""Noisy statistics of one job: the anchor's states of each document alone, the base's public statistics, the secret.

Knows a job and where its key lies; the mechanism is in ``noise``.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experts.errors import ManifestError
from pipelines.train.noise import Contributions, NoiseBudget, release

if TYPE_CHECKING:
    from torch import Tensor

    from experts.routing_artifacts import NoiseInfo, RoutingInfo, Statistics
    from pipelines.train.anchor import ResolvedBase
    from pipelines.train.job import DomainJob
    from pipelines.train.states import SplitDecoder

__all__ = ["check_public_statistics", "noise_secret", "noisy_statistics"]

_KEY_FILE = "noise.key"
_BATCH = 8


def check_public_statistics(job: DomainJob, routing: RoutingInfo | None, *, layer: int) -> None:
    """Refuse noise where the base does not publish what the contributions are measured from.

    Raises:
        ManifestError: The base publishes no statistics, or others than the job takes.
    """
    if not job.statistics.enabled or job.statistics.noise is None:
        return
    public = None if routing is None else routing.statistics
    wanted = (layer, job.statistics.normalization)
    if public is None or (public.layer, public.normalization) != wanted:
        found = (
            "publishes none"
            if public is None
            else f"publishes those of layer {public.layer} with normalization '{public.normalization}'"
        )
        raise ManifestError(
            f"statistics.noise needs the base's public statistics of layer {layer} with normalization '{wanted[1]}', "
            f"which documents are measured from; the base {found}. Attach them: coterie base public-routing"
        )


def noisy_statistics(
    job: DomainJob, *, base: ResolvedBase, split: SplitDecoder, documents: Sequence[Tensor]
) -> tuple[Statistics, NoiseInfo]:
    """Sum up what each document contributes, and add the noise.

    Args:
        job: With ``statistics.noise``.
        base: The anchor, with public statistics.
        split: The anchor, cut where the statistics are taken.
        documents: Token ids of single documents, ``(windows, length)`` each.

    Raises:
        DataError: See `pipelines.train.noise.release`.
    """
    settings, routing = job.statistics.noise, base.routing()
    assert settings is not None, "noise was asked for"
    assert routing is not None, "check_public_statistics() passed"
    public = routing.statistics
    assert public is not None, "check_public_statistics() passed"
    budget = NoiseBudget(
        epsilon=settings.epsilon, delta=settings.delta, release=settings.release, clip=settings.clip
    )
    given = Contributions(public=public, budget=budget, normalization=job.statistics.normalization)
    for ids in documents:
        given.add(_states(split, ids, skip_first=job.statistics.skip_first))
    return release(given, secret=noise_secret(job))


def noise_secret(job: DomainJob) -> bytes:
    """Return what the noise is drawn from: the seed of a job with ``statistics.noise``, or the owner's own key."""
    settings = job.statistics.noise
    assert settings is not None, "noise was asked for"
    return _key(job.directory / _KEY_FILE) if settings.seed is None else str(settings.seed).encode()


def _states(split: SplitDecoder, ids: Tensor, *, skip_first: bool) -> Tensor:
    """Return the states ``(tokens, d)`` of one document's windows; no rows for an empty document."""
    if not ids.numel():
        return ids.new_empty(0, 0)
    import torch

    states = torch.cat([split.lower(part) for part in torch.split(ids, _BATCH)])
    return states[:, int(skip_first) :].flatten(0, 1)


def _key(path: Path) -> bytes:
    """The owner's secret, made on first use, readable by the owner alone."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_bytes()
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(32))
        file.flush()
        os.fsync(file.fileno())
    return path.read_bytes()
