"""Kind ``ffn``: the feed-forward matrices of whole layers, under the base's own tensor names.

The folder holds ``config.json`` (``format_version``, ``layers``, optionally ``dtype`` and ``base``) and
``ffn.safetensors``. Knows nothing of how the matrices were trained or are mixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, final

from pydantic import BaseModel, ConfigDict, Field

from experts.base import BaseDescription
from experts.card import BaseRef
from experts.errors import AdmissionError
from experts.files import capped
from experts.kinds.kind import ExpertKind, ResolvedConfig
from experts.strict import validate

__all__ = ["FFNConfig", "FFNKind"]


class FFNConfig(BaseModel):
    """The configuration file of an ``ffn`` expert."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format_version: Literal[1]
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=10_000)]
    """Decoder layers whose feed-forward linears the expert brings, ascending."""
    dtype: Literal["F32", "BF16", "F16"] | None = None
    base: Annotated[str, Field(max_length=4096)] | None = None
    """Name of the base."""


@final
class FFNKind(ExpertKind):
    """Full feed-forward experts."""

    name = "ffn"
    config_file = "config.json"
    weights_file = "ffn.safetensors"

    def resolve(self, config: Mapping[str, object], base: BaseDescription) -> ResolvedConfig:
        """Take every feed-forward weight and bias of the declared layers."""
        parsed = validate(FFNConfig, dict(config), what="config.json", error=AdmissionError)
        _check_layers(parsed.layers, base)
        linears = [linear for layer in parsed.layers for linear in base.ffn_linears(layer).values()]
        shapes: dict[str, tuple[int, ...]] = {}
        for linear in linears:
            shapes[f"{linear.name}.weight"] = (linear.out_features, linear.in_features)
            if linear.bias:
                shapes[f"{linear.name}.bias"] = (linear.out_features,)
        return ResolvedConfig(
            shapes=shapes,
            layers=parsed.layers,
            rank=None,
            ffn_only=True,
            dtype=parsed.dtype,
            base_name=parsed.base,
        )

    def sanitize_config(self, config: Mapping[str, object], base_ref: BaseRef) -> dict[str, object]:
        """Name the base."""
        return {**config, "base": base_ref.name}


def _check_layers(layers: tuple[int, ...], base: BaseDescription) -> None:
    problems = [
        f"layers: the base has no layer {number}; it has 0 to {base.num_layers - 1}"
        for number in layers
        if number >= base.num_layers
    ]
    if list(layers) != sorted(set(layers)):
        problems.append(f"layers: {list(layers)} must ascend without repetition")
    if problems:
        raise AdmissionError("config.json does not fit the base:", problems=capped(problems))
