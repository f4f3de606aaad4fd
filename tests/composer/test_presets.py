"""Presets: what they stand for on which base, and that nothing else is stored."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from composer.lock import Lock
from composer.manifest import Manifest
from composer.planning import plan
from composer.presets import norms_ffn_output
from experts.errors import ManifestError

PAPER = {
    "scorer": "learned",
    "context": "token",
    "selector": "topk",
    "top_k": 4,
    "layer": None,
    "options": {"bias": True},
    "selector_options": {},
    "token_weight": 0.0,
    "preset": None,
}


def _router(pico: Any, *, family: str = "llama", **router: Any) -> dict[str, Any]:
    planned = plan(pico.manifest(family=family, **router), pico.library(family))
    return planned.to_dict()["router"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("family", "normalize"), [("llama", True), ("olmo2", False), ("gemma3_text", False)])
def test_the_paper_on_a_base(pico: Any, family: str, normalize: bool) -> None:
    """Only where a norm follows the FFN can the weights stay as they are."""
    assert _router(pico, family=family, preset="paper") == {**PAPER, "normalize": normalize}


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "gemma3_text", "gpt_neox", "phi3"])
def test_a_norm_after_the_ffn_makes_its_scale_immaterial(pico: Any, family: str) -> None:
    """The network itself is asked: with every FFN seven times as large, do the logits stay?"""
    import torch

    network, base, ids = pico.network(family), pico.description(family), pico.prompts()
    for module in network.modules():  # the norms' epsilon is large beside what a pico FFN returns
        for name in ("eps", "variance_epsilon"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    with torch.no_grad():
        before = network(ids).logits
        for layer in range(base.num_layers):
            down = network.get_submodule(base.ffn_linears(layer)["down"].name)
            for parameter in down.parameters():
                parameter *= 7
        change = float((network(ids).logits - before).abs().max())
    assert norms_ffn_output(base) == (change < 1e-4)
    assert change < 1e-4 or change > 1e-2


def test_what_is_written_beside_a_preset_wins(pico: Any) -> None:
    own = {"top_k": 2, "normalize": False, "context": "running_mean", "options": {"bias": False}}
    assert _router(pico, preset="paper", **own) == {**PAPER, **own}
    # the defaults of a manifest without a preset are wishes too, once they are written
    assert _router(pico, preset="paper", normalize=True, family="olmo2") == {**PAPER, "normalize": True}
    # another scorer has other options
    other = _router(pico, preset="paper", scorer="lda", options={"shrinkage": 0.2})
    assert other == {**PAPER, "normalize": True, "scorer": "lda", "options": {"shrinkage": 0.2}}


def test_a_folder_holds_the_settings_and_no_preset(pico: Any) -> None:
    folder = pico.composed("low_rank", preset="paper", top_k=3)
    written = {"scorer": "learned", "context": "token", "top_k": 3, "options": {"bias": True}}
    explicit = pico.composed("low_rank", **written, normalize=True, selector="topk")
    lock, same = Lock.read(folder), Lock.read(explicit)
    assert lock.router.model_dump() == {**PAPER, "normalize": True, "top_k": 3}
    assert lock.membership_digest == same.membership_digest
    assert lock.manifest_sha256 == same.manifest_sha256
    stored = yaml.safe_load((folder / "manifest.yaml").read_text())
    assert stored == yaml.safe_load((explicit / "manifest.yaml").read_text())


def test_a_manifest_with_a_preset_survives_writing_and_reading(pico: Any) -> None:
    manifest = pico.manifest(preset="paper", top_k=2)
    assert manifest.to_dict()["router"] == {"preset": "paper", "top_k": 2}
    again = Manifest.from_dict(manifest.to_dict())
    assert again == manifest
    assert again.router.model_fields_set == {"preset", "top_k"}
    assert plan(again, pico.library()).manifest == plan(manifest, pico.library()).manifest


def test_an_unknown_preset(pico: Any) -> None:
    with pytest.raises(ManifestError) as caught:
        pico.manifest(preset="papers")
    assert str(caught.value) == (
        "manifest has 1 problem:\n  - router.preset: input should be 'paper', given 'papers'"
    )
