"""A composed pico retriever for the frameworks' tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def retriever_folder(pico: Any) -> Path:
    """Three owners' query experts, composed."""
    from composer import Manifest, build, plan

    registry = pico.retriever_library()
    manifest = Manifest.from_dict(
        {
            "name": "trio",
            "recipe": "router_retriever",
            "base": "embedder",
            "experts": ["acme/search", "bob/search", "zoe/search"],
        }
    )
    return pico.once(
        lambda: build(plan(manifest, registry), pico.scratch("trio"), registry=registry),
        "integrations retriever",
    )


@pytest.fixture(scope="session")
def retriever(retriever_folder: Path) -> Any:
    """The loaded model of `retriever_folder`."""
    import composer

    return composer.load(retriever_folder)


@pytest.fixture(scope="session")
def texts(pico: Any) -> list[str]:
    """Texts of every owner's domain."""
    return [text for seed in (1, 2, 3) for text in pico.domain_texts(seed, count=4)]
