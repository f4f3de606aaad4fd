"""Composed pico retrievers, made once a session from the registry of pico retrievers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

EXPERTS = ("acme/search", "bob/search", "zoe/search")


class Retrievers:
    """Makes composed retrievers; what the methods return is shared and must not be changed."""

    experts = EXPERTS
    owners = ("acme", "bob", "zoe")

    def __init__(self, pico: Any) -> None:
        self.pico = pico

    def manifest(
        self, experts: Sequence[str] = EXPERTS, *, opt_out: Sequence[str] = (), **router: Any
    ) -> Any:
        """A manifest; further arguments go to ``router``."""
        from composer.manifest import Manifest

        return Manifest.from_dict(
            {
                "name": "pico",
                "recipe": "router_retriever",
                "base": "embedder",
                "experts": list(experts),
                "opt_out": list(opt_out),
                "router": router,
            }
        )

    def compose(self, manifest: Any, *, registry: Any = None) -> Path:
        """Plan and build a new folder."""
        from composer.building import build
        from composer.planning import plan

        scored = manifest.router.scorer.startswith(("pilot", "ridge"))
        source = self.pico.retriever_library(scored=scored) if registry is None else registry
        return build(plan(manifest, source), self.pico.scratch("out"), registry=source)

    def folder(self, experts: Sequence[str] = EXPERTS, **settings: Any) -> Path:
        """A composed folder; see `manifest`."""
        manifest = self.manifest(experts, **settings)
        return self.pico.once(lambda: self.compose(manifest), "retriever folder", manifest.digest)

    def model(self, experts: Sequence[str] = EXPERTS, **settings: Any) -> Any:
        """The loaded model of `folder`."""
        from composer.loading import load

        folder = self.folder(experts, **settings)
        return self.pico.once(lambda: load(folder), "retriever", folder)

    def stock(self) -> Any:
        """The base as sentence-transformers alone loads it."""
        from sentence_transformers import SentenceTransformer

        return self.pico.once(
            lambda: SentenceTransformer(str(self.pico.embedder()), device="cpu", local_files_only=True),
            "stock embedder",
        )

    def queries(self, count: int = 12) -> list[str]:
        """Texts of every owner's domain, in turn, and of nobody's."""
        parts = [self.pico.domain_texts(seed, count=100 + count)[100:] for seed in (1, 2, 3, 0)]
        return [text for group in zip(*parts, strict=True) for text in group][:count]


@pytest.fixture(scope="session")
def retrievers(pico: Any) -> Retrievers:
    """Composed pico retrievers; see the methods."""
    return Retrievers(pico)


@pytest.fixture(scope="session")
def texts(retrievers: Retrievers) -> list[str]:
    """Twelve queries."""
    return retrievers.queries()
