"""Where a training job stands, in one safetensors file that is always whole.

Knows tensors, an optimiser's state and numbers; knows nothing of what is trained. No pickle: the state that is
not a tensor is JSON in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from experts.files import write_atomic

__all__ = ["TrainingState", "load_checkpoint", "save_checkpoint"]

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """The numbers of a checkpoint.

    Attributes:
        step: Steps done.
        seconds: Training time so far, over all runs of the job.
        losses: Loss of the latest steps, over all runs of the job, the last one at the end.
    """

    step: int
    seconds: float
    losses: tuple[float, ...] = ()


def save_checkpoint(
    path: Path, *, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, state: TrainingState
) -> None:
    """Store parameters, AdamW's moments and torch's random state (uint8), in the CPU's form.

    Where parameters are on a GPU, its random state is stored too.
    """
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    if gpu := _gpu(parameters):
        tensors["rng.gpu"] = torch.cuda.get_rng_state(gpu)
    for number, parameter in enumerate(parameters):
        tensors[f"parameter.{number}"] = parameter.detach()
        if parameter not in optimizer.state:  # it had no gradient yet: nobody was routed to it
            continue
        for moment in _MOMENTS:
            tensors[f"{moment}.{number}"] = optimizer.state[parameter][moment]
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    write_atomic(path, save(tensors, metadata={"state": json.dumps(asdict(state))}))


def load_checkpoint(
    path: Path, *, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
) -> TrainingState | None:
    """Put a stored state back, exactly; None where there is no checkpoint.

    Raises:
        safetensors.SafetensorError: The file is damaged (it is never half-written by us).
    """
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        stored = json.loads(file.metadata()["state"])
        state = TrainingState(**stored | {"losses": tuple(stored.get("losses", ()))})
        names = set(file.keys())
        with torch.no_grad():
            for number, parameter in enumerate(parameters):
                parameter.copy_(file.get_tensor(f"parameter.{number}"))
                if f"step.{number}" in names:
                    optimizer.state[parameter] = {
                        # the step count of AdamW stays on the CPU
                        moment: file.get_tensor(f"{moment}.{number}").to(
                            "cpu" if moment == "step" else parameter.device, copy=True
                        )
                        for moment in _MOMENTS
                    }
        torch.set_rng_state(file.get_tensor("rng"))
        gpu = _gpu(parameters)
        if gpu and "rng.gpu" in names:
            torch.cuda.set_rng_state(file.get_tensor("rng.gpu"), gpu)
    return state


def _gpu(parameters: Sequence[nn.Parameter]) -> torch.device | None:
    """The GPU that trains, if one does."""
    return next((parameter.device for parameter in parameters if parameter.is_cuda), None)
