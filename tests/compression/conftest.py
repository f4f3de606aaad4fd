"""Full experts of the pico models, compressed, registered and composed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.compression.run import Compressed, compress_expert

Compress = Callable[..., Compressed]


@pytest.fixture(scope="session")
def near(pico: Any) -> Any:
    """A library in which ``acme/near`` is the anchor with a change of rank 3 on layer 1 and of rank 5 on layer 3."""
    import torch
    from safetensors.torch import load_file, save_file

    registry = pico.fresh_library()
    raw = pico.write_ffn(pico.scratch("raw"), seed=1, layers=(1, 3), copy=True)
    tensors = load_file(raw / "ffn.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        out, wide = tensor.shape
        rank = 3 if ".1." in name else 5
        left, right = (torch.randn(*shape, generator=generator) for shape in ((out, rank), (rank, wide)))
        tensors[name] = tensor + 0.02 * left @ right
    save_file(tensors, raw / "ffn.safetensors")
    registry.register(pico.pack(raw, name="acme/near", artifacts=pico.artifacts(seed=1, layers=(1, 3))))
    return registry


@pytest.fixture
def compress(pico: Any, near: Any, tmp_path: Path) -> Compress:
    """Compress an expert of the library of this family; the folder is ``tmp_path / "out"``."""

    def call(
        source: str | Path = "acme/near", *, family: str = "llama", rank: str, **options: Any
    ) -> Compressed:
        registry = options.pop("registry", near if family == "llama" else pico.library(family))
        options.setdefault("out", tmp_path / "out")
        return compress_expert(source, rank=rank, registry=registry, **options)

    return call


@pytest.fixture(scope="session")
def domain_texts() -> dict[str, Sequence[str]]:
    """Letters that the pico tokenizer knows."""
    return {
        "law": ["the licensee shall indemnify the licensor " * 20],
        "code": ["def main(argv): return len(argv) " * 20],
    }
