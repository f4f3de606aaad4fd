"""Sums of what routers read, made by an owner alone: those of the composition in which routers read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from composer.loading import load
from composer.upcycling.measuring import router_inputs
from experts.package import read_package
from experts.routing_artifacts import RoutingArtifacts
from pipelines.compression import CompressionError
from pipelines.train.router_inputs import publish_statistics


@pytest.fixture(scope="module")
def texts(pico: Any) -> list[str]:
    """Documents of acme's domain."""
    return [pico.prompt(1, length=60) for _ in range(8)]


def _windows(pico: Any, texts: list[str]) -> torch.Tensor:
    from transformers import AutoTokenizer

    from pipelines.train.windows import make_windows

    tokenizer = AutoTokenizer.from_pretrained(pico.base(), local_files_only=True)
    made = make_windows(texts, tokenizer, sequence_length=16, limit=9, seed=3, what="the text")
    return torch.from_numpy(made.ids).long()


@pytest.mark.parametrize(
    ("recipe", "attention", "family"),
    [("btx", None, "llama"), ("bam", "own", "olmo2"), ("bam", "shared", "llama")],
)
def test_sums_are_those_of_the_composition(
    pico: Any, texts: list[str], tmp_path: Path, recipe: str, attention: Any, family: str
) -> None:
    library = pico.dense_library(family)
    card = publish_statistics(
        "acme/dense",
        texts,
        registry=library,
        out=tmp_path / "out",
        attention=attention,
        sequence_length=16,
        windows=9,
        seed=3,
    )
    before = library.card(library.expert("acme/dense"))
    assert (card.name, card.version, card.kind) == ("acme/dense", 2, "dense")
    assert card.routing is not None
    assert card.routing.statistics == before.routing.statistics  # what was published before stays
    assert card.routing.rows == before.routing.rows
    own = RoutingArtifacts.load(tmp_path / "out", card.routing)
    upcycle = {"trunk": "frozen", **({"attention": {"kv": attention}} if attention else {})}
    folder = pico.composed(
        "dense", recipe=recipe, family=family, experts=("acme/dense", "bob/dense"), upcycle=upcycle
    )
    expected = router_inputs(load(folder), [_windows(pico, texts)], expert=1)
    branches = {"ffn"} if attention is None else {"ffn", "attention"}
    assert set(card.routing.inputs.branches) == branches
    for (branch, layer), sums in expected.items():
        found = own.inputs(layer, branch)
        assert (found is not None) == (branch in branches)
        if found is not None:
            assert found.count == sums.count
            np.testing.assert_allclose(found.sum, sums.sum, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(found.scatter, sums.scatter, rtol=1e-4, atol=1e-4)
    assert read_package(tmp_path / "out").digest == card.digest


def test_public_sums_are_the_anchors(pico: Any, texts: list[str], tmp_path: Path) -> None:
    from experts.routing_artifacts import RoutingInfo
    from pipelines.train.routing import public_routing

    folder = public_routing(
        pico.base(),
        texts,
        out=tmp_path / "public",
        layer=0,
        inputs=True,
        sequence_length=16,
        windows=9,
        seed=3,
    )
    info = RoutingInfo.model_validate_json((folder / "routing.json").read_bytes())
    own = RoutingArtifacts.load(folder, info)
    model = load(pico.composed("dense", recipe="bam", upcycle={"trunk": "frozen"}))
    for (branch, layer), sums in router_inputs(model, [_windows(pico, texts)], expert=0).items():
        found = own.inputs(layer, branch)
        assert found is not None
        np.testing.assert_allclose(found.sum, sums.sum, rtol=1e-4, atol=1e-4)


def test_only_whole_models(pico: Any, texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(CompressionError) as caught:
        publish_statistics("acme/low", texts, registry=pico.library(), out=tmp_path / "out")
    assert str(caught.value) == (
        "acme/low is of kind 'lora'. Router inputs are summed for whole models (kind 'dense'); other experts publish "
        "what `coterie train` or `coterie register --text` gives them."
    )
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
