"""Named settings of a router, written out for a base: what ``preset: paper`` in a manifest means.

Knows the settings and which bases need their weights renormalised; the plan and the lock only see the result.
"""

from __future__ import annotations

from typing import Any

from composer.manifest import Manifest, RouterSpec
from experts.base import BaseDescription

__all__ = ["expand_preset", "norms_ffn_output"]


def expand_preset(manifest: Manifest, base: BaseDescription) -> Manifest:
    """Write the router's preset out.

    ``paper`` is FlexOlmo as published (arXiv 2507.07024, sections 3 and 4): learned rows with their negative biases,
    every token scored by itself, four experts, weights not renormalised. Where the base does not normalise what its
    FFN returns, as the paper's does, the weights' sum would scale the FFN, so there they are renormalised.

    Args:
        manifest: As its builder wrote it.
        base: The anchor.

    Returns:
        The manifest without a preset. Keys that the builder wrote beside it win, ``options`` one by one; with another
        scorer than the preset's, its options do not apply.
    """
    router = manifest.router
    if router.preset is None:
        return manifest
    named: dict[str, Any] = {
        "scorer": "learned",
        "context": "token",
        "selector": "topk",
        "top_k": 4,
        "normalize": not norms_ffn_output(base),
        "options": {"bias": True},
    }
    written = {key: getattr(router, key) for key in router.model_fields_set - {"preset"}}
    settings = {**named, **written}
    settings["options"] = dict(router.options)
    if settings["scorer"] == named["scorer"]:
        settings["options"] = {**named["options"], **router.options}
    return manifest.model_copy(update={"router": RouterSpec(**settings)})


def norms_ffn_output(base: BaseDescription) -> bool:
    """Whether every layer normalises what its FFN returns (OLMo-2, Gemma-3), so that its scale is immaterial."""
    names = (f"{base.layers_prefix}.{i}.post_feedforward_layernorm.weight" for i in range(base.num_layers))
    return all(name in base.tensors for name in names)
