"""Properties of the mathematics that a change of code must not lose."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from composer.layers.moe import MoELayer


def _logits(model: Any, ids: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Run a model in float64 whose experts, the anchor among them, put out ``scale`` times as much."""
    model = model.double()  # so that the scale alone is seen, not rounding
    model.config._experts_implementation = "eager"
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.experts.down_proj.data *= scale
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.0
    with torch.inference_mode():
        logits: torch.Tensor = model(ids).logits
    return logits


@pytest.mark.parametrize(("family", "same"), [("olmo2", True), ("llama", False)])
def test_f10_only_a_norm_behind_the_experts_hides_their_scale(pico: Any, family: str, same: bool) -> None:
    """On OLMo-2 the mixture's output is normed, so the weights' total mass is irrelevant; elsewhere it is not."""
    import composer

    folder = pico.composed("stacked", family=family)
    ids = pico.prompts(rows=2, length=12)
    plain = _logits(composer.load(folder, dtype="float32"), ids, scale=1.0)
    scaled = _logits(composer.load(folder, dtype="float32"), ids, scale=7.0)
    difference = float((plain - scaled).abs().max())
    assert difference < 2e-6 if same else difference > 1e-2
