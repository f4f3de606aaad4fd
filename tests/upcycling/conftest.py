"""Compositions of whole models: three owners' different ones, and two owners' equal ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

DENSE = ("acme/dense", "bob/dense", "zoe/dense")
TWINS = ("acme/twin", "bob/twin")


@pytest.fixture(scope="session")
def folder(pico: Any) -> Callable[..., Any]:
    """A composed folder, shared: ``folder("bam", upcycle={"trunk": "frozen"}, top_k=2)``."""

    def make(recipe: str, *, experts: Any = DENSE, family: str = "llama", **settings: Any) -> Any:
        return pico.composed("dense", recipe=recipe, experts=experts, family=family, **settings)

    return make


@pytest.fixture(scope="session")
def loaded(pico: Any, folder: Callable[..., Any]) -> Callable[..., Any]:
    """The loaded model of ``folder``, shared."""
    from composer.loading import load

    def make(recipe: str, **settings: Any) -> Any:
        path = folder(recipe, **settings)
        return pico.once(lambda: load(path), "loaded", path)

    return make


@pytest.fixture(scope="session")
def state(pico: Any) -> Callable[..., dict[str, Any]]:
    """The tensors of one owner's model as its file has them, or of the base."""
    from safetensors.torch import load_file

    def read(owner: str, *, family: str = "llama") -> dict[str, Any]:
        if owner == "base":
            return load_file(pico.base(family) / "model.safetensors")
        library = pico.dense_library(family)
        record = library.expert(f"{owner}/dense")
        return load_file(library.files(record)["model.safetensors"])

    return read


@pytest.fixture(scope="session")
def twins(pico: Any) -> Callable[[str], Any]:
    """A registry in which two owners have the same model, and that model as transformers loads it."""

    def fill(family: str) -> Any:
        from transformers import AutoModelForCausalLM

        registry = pico.fresh_dense_library(family)
        raw = pico.write_dense(pico.scratch("raw"), family=family, seed=7)
        for name in TWINS:
            registry.register(pico.pack(raw, name=name, family=family))
        return registry, AutoModelForCausalLM.from_pretrained(raw, local_files_only=True).eval()

    return lambda family: pico.once(lambda: fill(family), "twins", family)


@pytest.fixture
def ids(pico: Any) -> Any:
    """Four prompts of 24 tokens."""
    return pico.prompts()
