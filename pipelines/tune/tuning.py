"""Tunes a composed model: from a manifest or a composed folder and a job to a new composed folder.

Knows what is trained, in which order, and where checkpoints are; the loop is ``pipelines.train.loop``.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.lock import Lock
from composer.members import BASE_FOLDER
from experts.errors import BuildError, TrainingError
from pipelines.tune.job import TuneJob
from pipelines.tune.planning import TuningPlan

if TYPE_CHECKING:
    import torch
    from torch import nn

    from composer.model import ComposedForCausalLM
    from pipelines.train.loop import LoopResult
    from pipelines.tune.devices import OneDevice
    from pipelines.tune.mix import Mix
    from registry import Registry

__all__ = ["Tuned", "tune"]

Progress = Callable[[int, int], None]
"""Called with the tokens trained on so far, and those of the whole job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """How tuning went.

    Attributes:
        folder: The tuned folder.
        loss: Mean of the last quarter of the steps, all losses counted.
        parameters: Numbers that were trained.
        tokens: Trained on, over all runs of the job.
        seconds: Spent, over all runs of the job.
        tokens_per_second: Their ratio.
        resumed_from: Step at which this run went on; 0: from the start.
    """

    folder: Path
    loss: float
    parameters: int
    tokens: int
    seconds: float
    tokens_per_second: float
    resumed_from: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return {**asdict(self), "folder": str(self.folder)}


def tune(
    plan: TuningPlan,
    job: TuneJob,
    out: Path | str,
    *,
    registry: Registry,
    device: str = "auto",
    progress: Progress | None = None,
) -> Tuned:
    """Train, and write the tuned folder; a job that was stopped goes on from its last checkpoint.

    Args:
        plan: From `plan_tuning`, for the same job.
        job: What to train.
        out: The folder to write; must not exist.
        registry: Whose files a manifest's composition is made of.
        device: ``auto``, ``cpu``, ``cuda``, ...; processes that Accelerate launched have one each.
        progress: Told how far it is.

    Raises:
        BuildError: ``out`` exists or cannot be written. Checkpoints are kept.
        DataError: A text does not fill one window.
        TrainingError: The loss is not finite, or the job's checkpoint is damaged.
        ManifestError: The device cannot do what the job asks.
    """
    from transformers import AutoTokenizer

    import composer
    from pipelines.tune.devices import compute_dtype, find_devices
    from pipelines.tune.mix import read_mix

    out = Path(out)
    _check_target(out)
    devices = find_devices(device, batch_size=job.batch_size)
    dtype = compute_dtype(job.dtype, devices.device)
    with _composed(plan, out, registry) as folder:
        mix = read_mix(job, AutoTokenizer.from_pretrained(folder / BASE_FOLDER, local_files_only=True))
        model = composer.load(folder, dtype="float32", device=devices.device)
        names = _open_parameters(model, job)
        checkpoint = _checkpoint(job, Lock.read(folder), mix)
        with _named(checkpoint):
            result = _train(model, names, mix, job, checkpoint, dtype, devices, progress)
        if devices.is_main:
            _write(model, folder, job, out)
            shutil.rmtree(checkpoint.parent, ignore_errors=True)
        devices.wait()
    return Tuned(
        folder=out,
        loss=result.loss,
        parameters=sum(model.get_parameter(name).numel() for name in names),
        tokens=job.tokens,
        seconds=result.seconds,
        tokens_per_second=job.tokens / max(result.seconds, 1e-9),
        resumed_from=result.resumed_from,
    )


def _check_target(out: Path) -> None:
    """Refuse before hours of training what would be refused after them."""
    if out.exists() or out.is_symlink():
        raise BuildError(f"The output folder {out} exists. Choose another name, or remove it first.")
    if not out.absolute().parent.is_dir():
        raise BuildError(
            f"There is no folder {out.absolute().parent} to write {out.name} into. Create it first."
        )


@contextmanager
def _composed(plan: TuningPlan, out: Path, registry: Registry) -> Iterator[Path]:
    """Yield the composed folder; one that a manifest stands for is built beside ``out`` for the time being."""
    if plan.folder is not None:
        yield plan.folder
        return
    from composer.building import build

    assert plan.plan is not None
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.untuned-") as scratch:
        yield build(plan.plan, Path(scratch) / "composed", registry=registry)


def _open_parameters(model: ComposedForCausalLM, job: TuneJob) -> tuple[str, ...]:
    """Let gradients reach what is trained; return the names."""
    from composer.tuned import parameter_groups, trained_names

    names = trained_names(parameter_groups(model), job.train)
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return names


def _checkpoint(job: TuneJob, lock: Lock, mix: Mix) -> Path:
    """Return a place that this very job, on this very text and composition, has for itself."""
    key = hashlib.sha256("\n".join((job.digest(), lock.membership_digest, mix.digest())).encode()).hexdigest()
    folder = job.workdir / f"tune-{key[:16]}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder / "checkpoint.safetensors"


@contextmanager
def _named(checkpoint: Path) -> Iterator[None]:
    """Name the file where a checkpoint is damaged: every retry of the job would read it."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise TrainingError(
            f"The checkpoint {checkpoint} is damaged ({error}), so the job cannot go on from it. Delete the file to "
            "begin anew."
        ) from None


def _train(
    model: ComposedForCausalLM,
    names: Sequence[str],
    mix: Mix,
    job: TuneJob,
    checkpoint: Path,
    dtype: torch.dtype,
    devices: OneDevice,
    progress: Progress | None,
) -> LoopResult:
    import torch

    from pipelines.train.loop import LoopSettings, train
    from pipelines.tune.objective import Objective

    decayed, undecayed = _by_decay(model, names)
    objective = Objective(
        model,
        torch.from_numpy(mix.ids).long().to(devices.device),
        parameters=[*decayed, *undecayed],
        load_balancing=job.load_balancing,
        router_z_loss=job.router_z_loss,
        micro_batch=job.micro_batch,
        dtype=dtype,
        devices=devices,
    )
    per_step = job.batch_size * job.sequence_length

    def report(done: int, *_: float) -> None:
        if progress is not None and devices.is_main:
            progress(done * per_step, job.tokens)

    return train(
        parameters=decayed,
        undecayed=undecayed,
        accumulate=objective.accumulate,
        plan=mix.plan,
        settings=LoopSettings(
            steps=job.steps,
            learning_rate=job.learning_rate,
            weight_decay=job.weight_decay,
            warmup=job.warmup,
            grad_clip=job.grad_clip,
            checkpoint_every=job.checkpoint_every,
            schedule=job.schedule,
        ),
        checkpoint=checkpoint,
        on_step=report,
        keeps_checkpoints=devices.is_main,
    )


def _by_decay(
    model: ComposedForCausalLM, names: Sequence[str]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Divide into the matrices of trunk and experts, and routers, norms and biases."""
    from composer.tuned import parameter_groups

    groups = parameter_groups(model)
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name in names:
        parameter = model.get_parameter(name)
        plain = groups[name] == "routers" or parameter.dim() < 2 or name.endswith("bias")
        (undecayed if plain else decayed).append(parameter)
    return decayed, undecayed


def _write(model: ComposedForCausalLM, folder: Path, job: TuneJob, out: Path) -> None:
    from composer.tuned import write_tuned

    write_tuned(
        model,
        out,
        trained=job.train,
        text_owners=job.text_owners,
        settings=job.settings(),
        dtype=_stored_dtype(folder),
    )


def _stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype in which a composition is loaded unless asked otherwise."""
    import torch
    from transformers import AutoConfig

    stored: Any = Lock.read(folder).dtype
    if stored is None:
        stored = AutoConfig.from_pretrained(folder / BASE_FOLDER, local_files_only=True).dtype
    dtype = getattr(torch, stored) if isinstance(stored, str) else stored
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
