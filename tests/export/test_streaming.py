"""Bytes on their way: copied without being held, rounded as torch rounds, cut where experts begin."""

from __future__ import annotations

import errno
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

MEGABYTE = 1 << 20


def slices(path: Path) -> dict[str, Any]:
    from composer.export.tensors import Slice
    from experts.safetensors_header import read_header

    return {name: Slice.of(path, tensor) for name, tensor in read_header(path).tensors.items()}


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 MB in three tensors."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    held = {f"t{n}": torch.randn(4, MEGABYTE, generator=generator) for n in range(3)}
    path = tmp_path_factory.mktemp("big") / "model.safetensors"
    save_file(held, path)
    return path


@pytest.mark.parametrize("tensors", [1, 3])
def test_a_disk_that_fails_beside_the_writing_is_met(
    tensors: int, big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells such an error once: a later sync of the same file would find nothing wrong."""
    from composer.export.shards import write_file
    from composer.export.tensors import Entry

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "the disk")

    monkeypatch.setattr(os, "fdatasync", fail)
    found = list(slices(big).items())[:tensors]
    entries = [Entry(name=name, spec=part.spec, source=part) for name, part in found]
    with pytest.raises(OSError, match="the disk"):
        write_file(tmp_path / "out.safetensors", entries)


@pytest.mark.parametrize("kernel", [True, False], ids=["in the kernel", "through a buffer"])
def test_copies_hold_no_tensor(
    kernel: bool, big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffer is 8 MiB, a tensor 16; without the kernel's help as on another file system."""
    import torch
    from safetensors.torch import load_file

    from composer.export.shards import write_file
    from composer.export.tensors import Entry

    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "another file system")

    if not kernel:
        monkeypatch.setattr(os, "copy_file_range", refuse)
    found = slices(big)
    # interleaved and cut, so that reads jump about in the file
    entries = [
        Entry(name=f"{name}.{row}", spec=part.item(row).spec, source=part.item(row))
        for row in range(4)
        for name, part in found.items()
    ]
    tracemalloc.start()
    try:
        write_file(tmp_path / "out.safetensors", entries)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * MEGABYTE
    before, after = load_file(big), load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(after[f"{name}.{row}"], before[name][row]) for name in before for row in range(4))


def test_other_errors_of_the_kernel_are_not_swallowed(
    big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from composer.export.shards import write_file
    from composer.export.tensors import Entry

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "copy_file_range", full)
    entry = Entry(name="t0", spec=slices(big)["t0"].spec, source=slices(big)["t0"])
    with pytest.raises(OSError, match="full"):
        write_file(tmp_path / "out.safetensors", [entry])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_rows_are_rounded_as_torch_rounds(dtype: str) -> None:
    import numpy as np
    import torch

    from composer.export.tensors import FLOATS, float_bytes

    values = np.random.default_rng(0).normal(size=4096).astype("f4")
    bits = values.view("<u4")
    bits[:1024] = (bits[:1024] & 0xFFFF0000) | 0x8000  # halfway between two bfloat16: ties go to even
    expected = torch.from_numpy(values).to(getattr(torch, FLOATS[dtype]))
    assert float_bytes(values, dtype) == bytes(expected.view(torch.uint8).numpy().data)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_are_read_exactly(dtype: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from composer.export.tensors import floats

    stored = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    save_file({"gate": stored}, tmp_path / "rows.safetensors")
    found = slices(tmp_path / "rows.safetensors")["gate"]
    assert torch.equal(torch.from_numpy(floats(found)), stored.float())
    assert torch.equal(torch.from_numpy(floats(found.item(3))), stored[3].float())
    assert torch.equal(torch.from_numpy(floats(found.rows(1, 4))), stored[1:4].float())


def test_low_rank_update_is_the_formula(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from composer.export.tensors import low_rank

    generator = torch.Generator().manual_seed(2)
    w, a, b = (torch.randn(s, generator=generator).bfloat16() for s in ((6, 5), (2, 5), (6, 2)))
    save_file({"w": w, "a": a, "b": b}, tmp_path / "lora.safetensors")
    found = slices(tmp_path / "lora.safetensors")
    entry = low_rank("x", found["w"], a=found["a"], b=found["b"], scaling=0.5, dtype="BF16")
    assert not hasattr(entry.source, "path")
    data = torch.frombuffer(bytearray(entry.source()), dtype=torch.bfloat16).view(6, 5)
    exact = w.double() + 0.5 * b.double() @ a.double()
    assert (data.double() - exact).abs().max() <= exact.abs().max() * 2**-8, "rounded once"
