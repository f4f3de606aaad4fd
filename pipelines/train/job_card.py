"""What an expert's card says about the job that trained it: choices and numbers, no path and no text.

Knows a job's fields; knows nothing of cards.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.train.retrieval_settings import RetrievalSettings

if TYPE_CHECKING:
    from pipelines.train.job import DomainJob

__all__ = ["card_settings"]


def card_settings(job: DomainJob) -> dict[str, str | int | float | bool | None]:
    """What the card says about the training: every choice and number, no path."""
    if job.retrieval is not None:
        return _of_retriever(job, job.retrieval)
    row_init = job.row_init if job.row_init in ("anchor", "random") else "sentence-transformer"
    low_rank = {} if job.kind == "dense" else {"alpha": job.alpha or float(job.rank), "rank": job.rank}
    settings: dict[str, str | int | float | bool | None] = {
        **low_rank,
        "public_fraction": job.public_fraction,
        "sequence_length": job.sequence_length,
        "batch_size": job.batch_size,
        "learning_rate": job.learning_rate,
        "schedule": job.schedule,
        "weight_decay": job.weight_decay,
        "warmup": job.warmup,
        "grad_clip": job.grad_clip,
        "seed": job.seed,
        "coordination": job.coordination.enabled,
    }
    if job.statistics.enabled:
        settings["statistics_skip_first"] = job.statistics.skip_first
        settings["statistics_epsilon"] = job.statistics.noise.epsilon if job.statistics.noise else None
    if job.coordination.enabled:
        settings |= {
            "router_z_loss": job.coordination.router_z_loss,
            "softmax_z_loss": job.coordination.softmax_z_loss,
            "bias": job.bias.form if job.bias.enabled else None,
            "row_init": str(row_init),
            "row_centre": job.row_centre,
            "row_rotation": job.row_rotation,
            "row_negatives": job.row_negatives,
        }
    return settings


def _of_retriever(job: DomainJob, retrieval: RetrievalSettings) -> dict[str, str | int | float | bool | None]:
    low_rank = ("rank", "alpha") if retrieval.form == "adapter" else ()
    shared = (*low_rank, "batch_size", "schedule", "weight_decay", "warmup", "grad_clip", "seed")
    own = retrieval.model_dump(exclude={"targets", "encode_batch"})
    return {
        **{name: getattr(job, name) for name in shared},
        **own,
        "held_out": float(job.held_out) if not isinstance(job.held_out, Path) else None,
        "targets": " ".join(retrieval.targets) if retrieval.targets else None,
    }
