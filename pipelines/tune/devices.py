"""What a tuning job runs on: one device, or several of which each has a process, through Accelerate.

Knows tensors and processes; knows nothing of models. Every process holds the whole model and takes its share of each
step's windows; gradients are averaged before they are clipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from experts.errors import ManifestError
from pipelines.devices import check_bfloat16, find_device, has_bfloat16

__all__ = ["OneDevice", "SeveralDevices", "compute_dtype", "find_devices"]


class OneDevice:
    """The only process.

    Args:
        name: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...

    Raises:
        ManifestError: There is no such device here.
    """

    count = 1
    is_main = True

    def __init__(self, name: str = "auto") -> None:
        self.device = find_device(name)

    def share(self, windows: Tensor) -> Tensor:
        """Return this process's part of a step's windows ``(batch,)``."""
        return windows

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over the processes."""
        return tensor

    def mean(self, value: float) -> float:
        """Average a number over the processes."""
        return value

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average every parameter's gradient over the processes."""

    def wait(self) -> None:
        """Wait for the other processes."""


class SeveralDevices(OneDevice):
    """One of several processes that ``accelerate launch`` or ``torchrun`` started."""

    def __init__(self) -> None:
        from accelerate import Accelerator

        self._accelerator: Any = Accelerator()
        self.count: int = self._accelerator.num_processes
        self.is_main: bool = self._accelerator.is_main_process
        self.device = self._accelerator.device

    def share(self, windows: Tensor) -> Tensor:
        """Return every n-th window; the batch divides evenly."""
        return windows[self._accelerator.process_index :: self.count]

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over the processes."""
        total: Tensor = self._accelerator.reduce(tensor, reduction="sum")
        return total

    def mean(self, value: float) -> float:
        """Average a number over the processes."""
        return float(self.sum(torch.tensor(value, dtype=torch.float64, device=self.device))) / self.count

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average every parameter's gradient; one that nobody here was routed to counts as zero."""
        for parameter in parameters:
            if parameter.grad is None:  # another process may have one, and all must take part
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self._accelerator.reduce(parameter.grad, reduction="mean")

    def wait(self) -> None:
        """Wait for the other processes."""
        self._accelerator.wait_for_everyone()


def find_devices(name: str, *, batch_size: int) -> OneDevice:
    """Return the one device that is named, or, in a process that was launched with others, its part of all.

    Raises:
        ManifestError: There is no such device here, or the batch cannot be shared out evenly.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return OneDevice(name)
    devices = SeveralDevices()
    if batch_size % devices.count:
        raise ManifestError(
            f"batch_size {batch_size} cannot be shared out evenly among {devices.count} processes; make it a multiple "
            f"of {devices.count}."
        )
    return devices


def compute_dtype(wanted: str | None, device: torch.device) -> torch.dtype:
    """Return what products are computed in: what is wanted, else bfloat16 where the device has it.

    Raises:
        ManifestError: bfloat16 is wanted and the device has none.
    """
    check_bfloat16(wanted, device)
    if wanted is None:
        # a CPU has it too, but is slower with it
        return torch.bfloat16 if device.type == "cuda" and has_bfloat16(device) else torch.float32
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32
