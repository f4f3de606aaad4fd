"""The order in which a retriever is trained, and what is reported on the way.

Knows `RetrieverRun`'s steps and the names of reports; knows nothing of who started the job.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipelines.train.anchor import ResolvedBase
from pipelines.train.job import DomainJob

if TYPE_CHECKING:
    from pipelines.train.retriever_run import RetrieverRun

__all__ = ["Report", "train_retriever"]


class Report(Protocol):
    """Takes a stage and numbers; sends them on, or not."""

    def __call__(self, stage: str, *, force: bool = False, **scalars: int | float | None) -> None:
        """Report."""


def train_retriever(job: DomainJob, *, base: ResolvedBase, report: Report) -> RetrieverRun:
    """Train, and measure before and after; the result is to be written.

    Raises:
        CoterieError: The base or the data are not usable.
        TrainingError: The loss stopped being finite.
        KeyboardInterrupt: Passed on, after a checkpoint.
    """
    import torch

    from pipelines.train.retriever_run import RetrieverRun

    torch.manual_seed(job.seed)
    report("loading", steps=job.steps)
    run = RetrieverRun(job, base=base)
    report("reading", force=True, documents=run.documents, queries=len(run.domain.queries))
    run.embed_documents()
    for done in run.prepare_states():
        report("states", queries=done)
    before = run.base_ndcg()
    run.attach()
    report("training", force=True, step=0, base_held_out_ndcg10=before)

    def on_step(step: int, loss: float, seconds: float) -> None:
        rate = step / max(seconds, 1e-9)
        report("training", step=step, loss=loss, seconds=seconds, eta_seconds=(job.steps - step) / rate)

    result = run.train(checkpoint=_checkpoint(run), on_step=on_step)
    report("training", resumed_from=result.resumed_from)
    report("training", force=True, held_out_ndcg10=run.held_out_ndcg(), loss=result.loss)
    return run


def _checkpoint(run: RetrieverRun) -> Path:
    """A name of its own for each combination of job, base and data, so that nothing foreign is resumed."""
    key = "|".join([run.job.digest(), run.base.ref.model_dump_json(), run.domain.digest()])
    return run.job.directory / f"checkpoint-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
