"""What a training job's fields say together that they may not: settings that mean nothing for the kind, contradictions.

Knows a job whose fields are right one by one; knows nothing of files or training.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.train.job_settings import NoiseSettings
from pipelines.train.retrieval_settings import LANGUAGE_FIELDS, RETRIEVER

if TYPE_CHECKING:
    from pipelines.train.job import DomainJob

__all__ = ["problems_together"]

_PARTIAL_FIELDS = (
    "rank",
    "alpha",
    "cache_gigabytes",
    "coordination",
    "bias",
    "row_init",
    "row_centre",
    "row_rotation",
    "row_negatives",
)
"""Fields of a job that say nothing about a whole model."""


def problems_together(job: DomainJob) -> list[str]:
    """Say which fields contradict each other; empty when none do."""
    problems = []
    if job.owner != job.name.partition("/")[0]:
        problems.append(f"owner '{job.owner}' is not the owner in the name '{job.name}'; leave it out")
    if job.public_fraction > 0 and not job.public:
        problems.append(f"public_fraction is {job.public_fraction} but no public text is given")
    if job.row_negatives > 0 and not (job.coordination.enabled and job.public_fraction > 0):
        problems.append("row_negatives needs coordination and a public_fraction above 0")
    if job.row_init == "random" and (job.row_centre or job.row_rotation is not None):
        problems.append("row_centre and row_rotation change rows that say something; row_init is random")
    problems += _retrieval_problems(job) + _dense_problems(job)
    if job.preset == "paper" and job.retrieval is None and "row_init" not in job.model_fields_set:
        problems.append(
            "the preset 'paper' starts rows at an embedding of the domain: give row_init the folder of a "
            "SentenceTransformer (the paper's is GritLM-7B), or write 'anchor' or 'random' to depart from it"
        )
    return problems


def _dense_problems(job: DomainJob) -> list[str]:
    if job.kind != "dense":
        return []
    fields = type(job).model_fields
    idle = [name for name in _PARTIAL_FIELDS if getattr(job, name) != fields[name].default]
    problems = [f"{', '.join(idle)}: not for whole models; leave them out"] if idle else []
    if job.layers != "all":
        problems.append("layers: of a whole model all are trained; leave them out")
    return problems


def _retrieval_problems(job: DomainJob) -> list[str]:
    if job.kind != "retriever":
        return [] if job.retrieval is None else ["retrieval is for the kind 'retriever' only; leave it out"]
    fields = type(job).model_fields
    idle = [name for name in LANGUAGE_FIELDS if getattr(job, name) != fields[name].default]
    problems = [f"{', '.join(idle)}: not for retrievers; leave them out"] if idle else []
    problems += _query_noise_problems(job)
    problems += _full_form_problems(job)
    if job.retrieval is not None and job.retrieval.hard_negatives and job.retrieval.negatives == "domain":
        problems.append(
            "retrieval.hard_negatives: with `negatives: domain` all of the domain's documents are negatives, the hard "
            "ones too; leave it out, or write negatives: batch"
        )
    if job.device not in ("auto", "cpu"):
        problems.append("device: retrievers are trained on the CPU; leave it out")
    if isinstance(job.held_out, Path):
        problems.append("held_out must be a share for retrievers")
    return problems


def _full_form_problems(job: DomainJob) -> list[str]:
    """Return what says something about matrices of low rank where none are trained."""
    settings = job.retrieval
    if settings is None or settings.form != "full":
        return []
    if job.preset is not None:
        return ["retrieval.form: what was published trains an adapter; leave preset or form out"]
    idle = [name for name in ("rank", "alpha") if getattr(job, name) != RETRIEVER[name]]
    idle += [f"retrieval.{name}" for name in ("targets", "dropout") if getattr(settings, name)]
    return [f"{', '.join(idle)}: not for `form: full`; leave them out"] if idle else []


def _query_noise_problems(job: DomainJob) -> list[str]:
    noise = job.statistics.noise
    if noise is None:
        return []
    problems = []
    if noise.clip != NoiseSettings.model_fields["clip"].default:
        problems.append("statistics.noise.clip: every query of a retriever has length 1; leave it out")
    if job.retrieval is not None and job.retrieval.second_moment == "always" and noise.release == "mean":
        problems.append(
            "retrieval.second_moment is 'always', but statistics.noise.release 'mean' publishes none; write "
            "release: moments"
        )
    return problems
