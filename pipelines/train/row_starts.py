"""What rows start at, in the words of a card, and whether a job's can stand beside its base's public rows.

Knows a job and what a base declares; knows nothing of the vectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from experts.errors import ManifestError

if TYPE_CHECKING:
    from experts.routing_artifacts import RoutingInfo
    from pipelines.train.job import DomainJob

__all__ = ["CENTRED", "EMBEDDED", "check_start", "public_start"]

EMBEDDED = "sentence-transformer"
CENTRED = "sentence-transformer-centred"
"""At an embedding, by its difference to the public one, beside public rows of other coordinates."""
_IMPORTED = "imported"
"""Of a checkpoint that does not say where its rows started."""


def public_start(public: RoutingInfo | None, layers: tuple[int, ...]) -> str | None:
    """Say what the public rows that a job takes from its base start at; None where it makes its own."""
    if public is None or public.rows is None or not set(layers) <= set(public.rows.layers):
        return None
    return public.rows.init


def check_start(job: DomainJob, public: RoutingInfo | None, layers: tuple[int, ...]) -> None:
    """Refuse before the training what could not be composed after it.

    Args:
        job: Its ``row_init`` and ``row_centre`` count.
        public: What the base publishes.
        layers: Layers that are trained.

    Raises:
        ManifestError: The rows would start in other coordinates than the public rows have.
    """
    if not job.coordination.enabled or job.row_init == "random":
        return
    start, own = public_start(public, layers), "anchor" if job.row_init == "anchor" else EMBEDDED
    if start in (None, own, _IMPORTED) or (own == EMBEDDED and job.row_centre):
        return
    word = "without" if own == "anchor" else "with"
    raise ManifestError(
        f"row_init: rows that start at '{own}' cannot be compared with the base's public rows, which start at "
        f"'{start}'. Choose the row_init that they were made with, or attach public rows made {word} --embedder."
    )
