"""Where a model family keeps its feed-forward linears, recognised from tensor names alone.

Knows the name patterns of the families; knows nothing of activation functions or of how the linears are used.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from experts.errors import AdmissionError
from experts.safetensors_header import TensorSpec

__all__ = ["LAYOUTS", "FFNLayout", "FoundLayout", "find_layout", "text_config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FFNLayout:
    """One way of naming the feed-forward linears of a layer."""

    name: str
    """Key in `LAYOUTS`."""
    style: Literal["gated", "dense", "fused"]
    """``gated``: down(act(gate x) * up x); ``dense``: down(act(up x)); ``fused``: gate and up in one matrix,
    gate rows first."""
    module: str
    """The sub-module of a layer that is the feed-forward block; empty where the layer itself holds the linears."""
    linears: Mapping[str, str]
    """Role (``gate``, ``up``, ``down`` or ``gate_up``) to the linear's name within ``module``."""
    encoder: bool = False
    """Whether the family reads a text in both directions and is used for embeddings, not for generating."""

    def name_of(self, role: str, *, prefix: str, layer: int) -> str:
        """Return the full module name of a linear, without ``.weight``."""
        return ".".join(part for part in (prefix, str(layer), self.module, self.linears[role]) if part)


LAYOUTS: dict[str, FFNLayout] = {
    layout.name: layout
    for layout in (
        # Llama, Mistral, SmolLM, Qwen2/3, OLMo-2/3, Gemma-1/2/3, ...
        FFNLayout(
            name="gated",
            style="gated",
            module="mlp",
            linears={"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
        ),
        # Phi-3, Phi-4, GLM-4
        FFNLayout(
            name="fused",
            style="fused",
            module="mlp",
            linears={"gate_up": "gate_up_proj", "down": "down_proj"},
        ),
        # GPT-NeoX, Pythia, Falcon
        FFNLayout(
            name="dense_4h",
            style="dense",
            module="mlp",
            linears={"up": "dense_h_to_4h", "down": "dense_4h_to_h"},
        ),
        # Phi-1, Phi-1.5, Phi-2
        FFNLayout(name="dense_fc", style="dense", module="mlp", linears={"up": "fc1", "down": "fc2"}),
        # BERT, MiniLM, RoBERTa, XLM-R (E5, BGE), MPNet
        FFNLayout(
            name="encoder",
            style="dense",
            module="",
            linears={"up": "intermediate.dense", "down": "output.dense"},
            encoder=True,
        ),
    )
}
"""The layouts that are recognised, most specific first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundLayout:
    """A layout found in a base: where its layers are and how many there are."""

    layout: FFNLayout
    prefix: str
    """What stands before the layer number, for instance ``model.layers``."""
    num_layers: int


def text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """Return the part of a transformers ``config.json`` that describes the decoder."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def find_layout(tensors: Mapping[str, TensorSpec], *, config: Mapping[str, object]) -> FoundLayout:
    """Recognise the feed-forward layout of a base from its tensor names.

    The prefix of the layers is discovered. Where several stacks of layers match (a vision tower beside a
    decoder), the one with ``num_hidden_layers`` and ``hidden_size`` of the configuration is taken.

    Args:
        tensors: Every tensor of the base.
        config: The base's ``config.json``.

    Raises:
        AdmissionError: No known layout, or more than one.
    """
    found = [hit for layout in LAYOUTS.values() for hit in _matches(layout, tensors)]
    fitting = [hit for hit in found if not _conflict(hit, tensors, config)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        stacks = ", ".join(f"{hit.prefix} ({hit.layout.name})" for hit in fitting)
        raise AdmissionError(
            f"The base has several stacks of feed-forward layers that fit its config: {stacks}."
        )
    raise AdmissionError(
        f"No feed-forward layers of a known layout in the base (model_type {config.get('model_type')!r}, "
        f"{len(tensors)} tensors). Looked for, in every layer N of one prefix:",
        problems=[*(_pattern(layout) for layout in LAYOUTS.values()), *_near_misses(found, tensors, config)],
    )


def _pattern(layout: FFNLayout) -> str:
    names = (layout.name_of(role, prefix="<prefix>", layer=0) for role in layout.linears)
    return f"{layout.name}: " + ", ".join(f"{name}.weight".replace(".0.", ".N.", 1) for name in names)


def _near_misses(
    found: list[FoundLayout], tensors: Mapping[str, TensorSpec], config: Mapping[str, object]
) -> list[str]:
    return [
        f"not taken: {hit.prefix} ({hit.layout.name}): {_conflict(hit, tensors, config)}" for hit in found
    ]


def _matches(layout: FFNLayout, tensors: Mapping[str, TensorSpec]) -> list[FoundLayout]:
    """Find every prefix whose layers, counted from 0 without a gap, all have the linears of the layout."""
    names = "|".join(re.escape(linear) for linear in layout.linears.values())
    module = re.escape(f"{layout.module}." if layout.module else "")
    pattern = re.compile(rf"(?P<prefix>.+)\.(?P<layer>\d+)\.{module}({names})\.weight")
    layers: defaultdict[str, set[int]] = defaultdict(set)
    for name, spec in tensors.items():
        match = pattern.fullmatch(name)
        if match and len(spec.shape) == 2:
            layers[match["prefix"]].add(int(match["layer"]))
    return [
        FoundLayout(layout=layout, prefix=prefix, num_layers=len(numbers))
        for prefix, numbers in sorted(layers.items())
        if numbers == set(range(len(numbers)))
        and all(
            f"{layout.name_of(role, prefix=prefix, layer=layer)}.weight" in tensors
            for layer in numbers
            for role in layout.linears
        )
    ]


def _conflict(
    hit: FoundLayout, tensors: Mapping[str, TensorSpec], config: Mapping[str, object]
) -> str | None:
    """Say in what the layers found contradict the configuration, if they do."""
    decoder = text_config(config)
    layers, width = decoder.get("num_hidden_layers"), decoder.get("hidden_size")
    down = tensors[f"{hit.layout.name_of('down', prefix=hit.prefix, layer=0)}.weight"].shape
    if layers is not None and layers != hit.num_layers:
        return f"{hit.num_layers} layers, the config says {layers}"
    if width is not None and width != down[0]:
        return f"width {down[0]}, the config says {width}"
    return None
