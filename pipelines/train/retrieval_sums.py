"""What the owner of a retriever publishes of the queries: sums at each place, exact or noisy, and their mean.

Knows a job's settings and features of single queries; knows nothing of models or how features are made.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from experts.embedding import EmbeddingSpec
from experts.errors import ManifestError
from experts.retrieval_artifacts import Moments, Pilot, RetrievalArtifacts
from experts.retrieval_info import RetrievalNoise
from pipelines.train.job import DomainJob
from pipelines.train.noisy_statistics import noise_secret
from pipelines.train.retrieval_noise import noisy_moments
from pipelines.train.retrieval_settings import RetrievalSettings

__all__ = ["check_query_noise", "query_artifacts"]

Array = NDArray[np.float64]


def check_query_noise(job: DomainJob, spec: EmbeddingSpec) -> None:
    """Refuse noise where nothing bounds what a query contributes.

    Raises:
        ManifestError: The job asks for noise and the base's embeddings have any length.
    """
    if job.statistics.enabled and job.statistics.noise is not None and not spec.normalize:
        raise ManifestError(
            "statistics.noise needs queries of bounded length, and the base does not divide its embeddings by theirs. "
            "Leave it out, or publish nothing (statistics: false)."
        )


def query_artifacts(
    job: DomainJob,
    settings: RetrievalSettings,
    spec: EmbeddingSpec,
    features: Mapping[str, Array],
    *,
    layer: int,
) -> RetrievalArtifacts | None:
    """Sum up queries of training and labels, never held-out ones.

    Args:
        job: Says whether there is noise.
        settings: Of the job, for retrievers.
        spec: How the base makes vectors.
        features: Place (``embedding``, perhaps ``state`` and ``static``) -> float64 ``(queries, d)``.
        layer: That the states enter.

    Returns:
        None where statistics are switched off or too few.

    Raises:
        DataError: See `pipelines.train.retrieval_noise.noisy_moments`.
    """
    vectors = features["embedding"]
    if not job.statistics.enabled or len(vectors) < settings.min_group:
        return None
    moments, noise = _moments(job, settings, features)
    # over the queries of the sums: the difference of two sets would be the few that are in one of them
    pilot = Pilot(expert=job.name, queries=len(vectors), vector=vectors.mean(axis=0))
    return RetrievalArtifacts.create(
        embedding=moments["embedding"],
        normalization="l2" if spec.normalize else "none",
        min_group=settings.min_group,
        state=moments.get("state"),
        state_layer=layer if "state" in features else None,
        static=moments.get("static"),
        pilots=[pilot] if settings.pilot and noise is None else [],
        noise=noise,
    )


def _moments(
    job: DomainJob, settings: RetrievalSettings, features: Mapping[str, Array]
) -> tuple[dict[str, Moments], RetrievalNoise | None]:
    wanted = job.statistics.noise
    if wanted is not None:
        return noisy_moments(
            features,
            epsilon=wanted.epsilon,
            delta=wanted.delta,
            release=wanted.release,
            secret=noise_secret(job),
        )
    count, width = features["embedding"].shape
    asked = settings.second_moment
    second = asked == "always" or (asked == "auto" and count >= 2 * width)
    exact = {place: Moments.from_vectors(rows, second_moment=second) for place, rows in features.items()}
    return exact, None
