"""Where tensors are computed on: what a device's name means on this machine, and whether it is there.

Knows torch's devices; knows nothing of models. Light to import: torch is loaded when a device is looked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from experts.errors import ManifestError

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceName", "check_bfloat16", "deterministic", "find_device", "has_bfloat16", "is_gpu"]

_NAMES = re.compile(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?")
_WORKSPACES = (":4096:8", ":16:8")
"""Settings of cuBLAS under which its products have the same bits at every run."""


def _check_name(name: str) -> str:
    if not _NAMES.fullmatch(name):
        raise ValueError(f"'{name}' found; write auto, cpu, cuda, or a GPU's number as in cuda:1")
    return name


DeviceName = Annotated[str, AfterValidator(_check_name)]
"""``auto`` (a GPU where torch has one, else the CPU), ``cpu``, ``cuda`` or ``cuda:1``, as a field of settings."""


def find_device(name: str) -> torch.device:
    """Return the device that is meant, if it is there.

    Args:
        name: ``auto``: the current GPU where torch has one, else the CPU; or a device as torch calls it.

    Raises:
        ManifestError: torch knows no such device, or has no such GPU.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ManifestError(
            f"device: '{name}' found; write auto, cpu, cuda, or a GPU's number as in cuda:1."
        ) from None
    if device.type == "cuda":
        _check_gpu(device)
    return device


def _check_gpu(device: torch.device) -> None:
    import torch

    advice = "Write device: cpu, or auto, which takes what there is."
    if torch.version.cuda is None and not torch.cuda.is_available():
        raise ManifestError(
            f"device: {device} needs a torch with CUDA; the installed one, {torch.__version__}, has none. {advice}"
        )
    if not torch.cuda.is_available():
        raise ManifestError(
            f"device: {device} is not there: torch finds no GPU on this machine (nvidia-smi lists what the driver "
            f"sees, CUDA_VISIBLE_DEVICES what processes may use). {advice}"
        )
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        there = ", ".join(f"cuda:{index}" for index in range(count))
        raise ManifestError(f"device: {device} is not there; this machine has {there}. {advice}")


def is_gpu(device: torch.device | str) -> bool:
    """Whether a device that was found is a GPU."""
    return str(device).startswith("cuda")


def has_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are the device's own; every CPU has them, fast or not."""
    import torch

    return device.type != "cuda" or torch.cuda.is_bf16_supported()


def check_bfloat16(wanted: str | None, device: torch.device) -> None:
    """Refuse a dtype that the device does not have.

    Raises:
        ManifestError: bfloat16 is wanted and the device has none.
    """
    if wanted == "bfloat16" and not has_bfloat16(device):
        raise ManifestError(f"dtype: {device} has no bfloat16; leave dtype out or write float32.")


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Have a GPU give the same bits at every run in the block, so that a resumed job ends as an uninterrupted one.

    On a CPU nothing is changed: its kernels do so anyway. On a GPU an operation that cannot raises a `RuntimeError`.
    """
    import torch

    if device.type != "cuda":
        yield
        return
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in _WORKSPACES:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = _WORKSPACES[0]
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)
