"""Trains one owner's expert, in this process, from the job to the packed folder.

Knows the order of the work and what it reports; knows nothing of who started it or of other owners.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from experts.errors import CoterieError, TrainingError
from pipelines.devices import check_bfloat16, deterministic, find_device, is_gpu
from pipelines.train.anchor import (
    ResolvedBase,
    compute_dtype,
    load_anchor,
    resolve_base,
    statistics_layer,
)
from pipelines.train.job import DomainJob
from pipelines.train.noisy_statistics import check_public_statistics
from pipelines.train.progress import Progress, ProgressFn
from pipelines.train.row_starts import check_start

if TYPE_CHECKING:
    import torch

    from experts.card import TrainingInfo
    from pipelines.train.dense_run import DenseRun
    from pipelines.train.expert_run import ExpertRun
    from pipelines.train.loop import LoopResult
    from pipelines.train.retriever_run import RetrieverRun
    from registry import Registry

__all__ = ["check_device", "check_job", "train_job"]


_CARD_METRICS = ("held_out_nll", "anchor_held_out_nll", "held_out_ndcg10", "base_held_out_ndcg10")


class _Reporter:
    """Sends progress, at most a few times a second unless the stage changes, and keeps the last numbers."""

    _INTERVAL = 0.2

    def __init__(self, name: str, send: ProgressFn | None) -> None:
        self._name = name
        self._send = send
        self._last = (0.0, "")
        self.scalars: dict[str, int | float] = {}

    def __call__(self, stage: str, *, force: bool = False, **scalars: int | float | None) -> None:
        self.scalars |= {name: value for name, value in scalars.items() if value is not None}
        now = time.monotonic()
        if self._send is None or (
            not force and stage == self._last[1] and now - self._last[0] < self._INTERVAL
        ):
            return
        self._last = (now, stage)
        self._send(Progress(name=self._name, stage=stage, scalars=dict(self.scalars)))


def train_job(
    job: DomainJob,
    *,
    out: Path,
    workdir: Path | None = None,
    base: ResolvedBase | None = None,
    registry: Registry | None = None,
    version: int | None = None,
    progress: ProgressFn | None = None,
    threads: int | None = None,
) -> Path:
    """Train the expert that ``job`` describes.

    A job that was cut short resumes from its last checkpoint, to the same bytes, as long as neither the job
    nor the text has changed; otherwise it starts anew.

    Args:
        job: The job; its paths are read in this process.
        out: The folder to create; receives the packed expert, whole or not at all.
        workdir: The owner's private folder, in the place of the job's own.
        base: The anchor, if it is already at hand; otherwise ``job.base`` is looked up.
        registry: Where base names are looked up, and the next version number.
        version: The expert's version; by default the registry's next, or 1 without a registry.
        progress: Called with every report.
        threads: Threads for the arithmetic; by default all cores.

    Returns:
        ``out``, ready for `Registry.register`.

    Raises:
        CoterieError: ``out`` exists, the job is running already, the device, the base or the text is not usable.
        TrainingError: The loss stopped being finite, or the GPU's memory is too small.
        KeyboardInterrupt: Passed on, after a checkpoint.
    """
    device = check_device(job)
    if workdir is not None:
        job = job.model_copy(update={"workdir": workdir})
    if version is None:
        version = registry.next_version(job.name) if registry else 1
    report = _Reporter(job.name, progress)
    report("starting")
    with ExitStack() as stack:
        stack.enter_context(_only_one(job))
        base = base or stack.enter_context(resolve_base(job.base, registry=registry))
        check_job(job, base=base, version=version, out=out)
        stack.enter_context(_threads(threads))
        stack.enter_context(_enough_memory(device))
        stack.enter_context(deterministic(device))
        run = (
            _train(job, base=base, device=device, report=report)
            if job.retrieval is None
            else _retrieve(job, base, report)
        )
        report("packing", force=True)
        _publish(job, run=run, base=base, version=version, out=out, metrics=report.scalars)
        for checkpoint in job.directory.glob("checkpoint-*.safetensors"):
            checkpoint.unlink()
    report("done", force=True)
    return out


def check_device(job: DomainJob) -> torch.device:
    """Return the device that a job is trained on; that of a retriever is the CPU.

    Raises:
        ManifestError: It is not there, or cannot compute in the job's dtype.
    """
    device = find_device("cpu" if job.retrieval is not None else job.device)
    check_bfloat16(job.dtype, device)
    return device


@contextmanager
def _enough_memory(device: torch.device) -> Iterator[None]:
    """Say what to do where a GPU's memory is too small."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise TrainingError(
            f"The memory of {device} is too small. Lower batch_size, sequence_length or cache_gigabytes, train fewer "
            "owners at once, or write device: cpu."
        ) from None


def _retrieve(job: DomainJob, base: ResolvedBase, report: _Reporter) -> RetrieverRun:
    from pipelines.train.retriever_job import train_retriever

    return train_retriever(job, base=base, report=report)


@contextmanager
def _only_one(job: DomainJob) -> Iterator[None]:
    """Keep a second run of the same job out."""
    from filelock import FileLock, Timeout

    job.directory.mkdir(parents=True, exist_ok=True)
    job.directory.chmod(0o700)  # what lies in it, checkpoints and logs, tells of the data
    lock = FileLock(job.directory / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise TrainingError(f"{job.name} is being trained already. Wait for it, or stop it.") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Use ``count`` threads in the block, and what was set before after it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _checkpoint_path(job: DomainJob, *, base: ResolvedBase, corpus_digest: str, device: torch.device) -> Path:
    """A name of its own for each combination of job, anchor, text and device, so that nothing foreign is resumed."""
    import hashlib

    routing = base.routing_info.model_dump_json() if base.routing_info else ""
    where = ["gpu"] if is_gpu(device) else []  # the last bits differ; which GPU it is does not matter
    key = "|".join([job.digest(), base.ref.fingerprint, routing, corpus_digest, *where])
    return job.directory / f"checkpoint-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


def _train(
    job: DomainJob, *, base: ResolvedBase, device: torch.device, report: _Reporter
) -> ExpertRun | DenseRun:
    import torch

    from pipelines.train.corpus import read_corpus
    from pipelines.train.dense_run import DenseRun
    from pipelines.train.expert_run import ExpertRun
    from pipelines.train.trainers import get_trainer
    from pipelines.train.trainers.base import ModelTrainer

    torch.manual_seed(job.seed)
    report("loading", steps=job.steps)
    dtype = job.dtype or compute_dtype(base.description, device)
    whole = issubclass(get_trainer(job.kind), ModelTrainer)
    model, tokenizer = load_anchor(base, dtype="float32" if whole else dtype, device=device)
    report("reading")
    corpus = read_corpus(job, tokenizer)
    report("states", tokens=0, documents=corpus.own.documents)
    run: ExpertRun | DenseRun
    if whole:
        run = DenseRun(job, base=base, model=model, corpus=corpus, dtype=dtype)
    else:
        run = ExpertRun(job, base=base, model=model, corpus=corpus)
    report("states", force=not run.cached, cached=int(run.cached))
    for done in run.prepare_states():
        report("states", tokens=done * job.sequence_length)
    before = run.held_out_nll()
    run.attach()
    checkpoint = _checkpoint_path(job, base=base, corpus_digest=dtype + corpus.digest(), device=device)
    result = _loop(job, run=run, checkpoint=checkpoint, anchor_nll=before, report=report)
    report("training", force=True, held_out_nll=run.held_out_nll(), loss=result.loss)
    return run


def _loop(
    job: DomainJob,
    *,
    run: ExpertRun | DenseRun,
    checkpoint: Path,
    anchor_nll: float | None,
    report: _Reporter,
) -> LoopResult:
    from pipelines.train.loop import LoopSettings, one_pass, plan_batches, train

    plan = plan_batches(
        steps=job.steps,
        batch_size=job.batch_size,
        own=len(run.corpus.own),
        public=len(run.corpus.public) if run.corpus.public else 0,
        public_fraction=job.public_fraction,
        seed=job.seed,
    )
    per_step = job.batch_size * job.sequence_length
    first: list[tuple[int, float]] = []

    def on_step(step: int, loss: float, seconds: float) -> None:
        first.append((step, seconds)) if not first else None
        rate = (
            (step - first[0][0]) / (seconds - first[0][1])
            if step > first[0][0]
            else step / max(seconds, 1e-9)
        )
        report(
            "training",
            step=step,
            tokens=step * per_step,
            loss=loss,
            seconds=seconds,
            tokens_per_second=rate * per_step,
            eta_seconds=(job.steps - step) / rate,
        )

    report("training", step=0, tokens=0, anchor_held_out_nll=anchor_nll)
    settings = LoopSettings(
        steps=job.steps,
        learning_rate=job.learning_rate or run.trainer.default_learning_rate,
        weight_decay=job.weight_decay,
        warmup=job.warmup,
        grad_clip=job.grad_clip,
        checkpoint_every=job.checkpoint_every,
        schedule=job.schedule,
    )
    result = train(
        parameters=run.parameters,
        undecayed=run.gate_parameters,
        accumulate=one_pass(run.loss),
        plan=plan,
        settings=settings,
        checkpoint=checkpoint,
        on_step=on_step,
    )
    report("training", resumed_from=result.resumed_from)
    return result


def _training_info(job: DomainJob) -> TrainingInfo:
    """What the card says of the training. No time: a resumed job gives the same bytes as an uninterrupted one."""
    from experts.card import TrainingInfo
    from pipelines.train.trainers import get_trainer

    rate = job.learning_rate or get_trainer(job.kind).default_learning_rate
    return TrainingInfo(
        method=f"{job.kind}-coordinated" if job.coordination.enabled else job.kind,
        tokens=None if job.retrieval else job.steps * job.batch_size * job.sequence_length,
        steps=job.steps,
        settings=job.card_settings() | {"learning_rate": rate},
        data_statement=job.data_statement,
    )


def check_job(job: DomainJob, *, base: ResolvedBase, version: int, out: Path) -> None:
    """Find out before the training what would otherwise fail after it.

    Raises:
        CoterieError: ``out`` exists.
        AdmissionError: The kind of expert is not made for such a base.
        ManifestError: The base does not have the job's layers, or not the statistics that noise needs, or public rows
            that start at something else.
        CardError: A field that the card refuses; it is tried with a made-up file.
    """
    from experts.card import ExpertCard, FileEntry
    from experts.kinds import get_kind

    if out.exists():
        raise CoterieError(f"'{out}' exists already. Choose another folder for {job.name}, or remove it.")
    get_kind(job.kind).check_base(base.description)
    layers = job.layer_numbers(base.description.num_layers)
    check_public_statistics(job, base.routing_info, layer=statistics_layer(job, base))
    check_start(job, base.routing_info, layers)
    ExpertCard.create(
        format_version=1,
        library_version="0",
        name=job.name,
        version=version,
        owner=job.owner,
        domain=job.domain,
        kind=job.kind,
        license=job.license,
        base=base.ref,
        layers=layers,
        rank=None,
        files=(FileEntry(path="made-up", size=0, sha256="0" * 64),),
        training=_training_info(job),
        description=job.description,
    )


def _publish(
    job: DomainJob,
    *,
    run: ExpertRun | DenseRun | RetrieverRun,
    base: ResolvedBase,
    version: int,
    out: Path,
    metrics: dict[str, int | float],
) -> None:
    """Write the expert into the owner's folder and pack it to ``out``, whole or not at all."""
    from experts.package import pack

    raw = job.directory / "expert"
    shutil.rmtree(raw, ignore_errors=True)
    raw.mkdir()
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        routing = run.write(raw)
        pack(
            raw,
            out,
            name=job.name,
            version=version,
            domain=job.domain,
            license=job.license,
            base=base.description,
            base_ref=base.ref,
            training=_training_info(job),
            routing=routing,
            metrics={name: float(metrics[name]) for name in _CARD_METRICS if name in metrics},
            description=job.description,
            kind=job.kind,
        )
    finally:
        shutil.rmtree(raw, ignore_errors=True)
