"""What every stock checkpoint answers: which bases it is exact for, how its tensors are called, its configuration.

Knows names and settings; knows nothing of where weights come from or whether a composition is exact.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

__all__ = ["ANCHOR", "LAYER", "StockTarget"]

ANCHOR = 0
"""Index of the anchor in every checkpoint, as in every composition; named here since the routing code needs torch."""

LAYER = r"model\.layers\.\d+"
"""Pattern of a decoder layer's prefix."""


class StockTarget(ABC):
    """A mixture-of-experts class of transformers that other programs load too.

    Attributes:
        title: How messages call it.
        families: ``model_type`` of the dense bases whose every other block is this class's own.
        condition: What messages add to the families, where not every base of them fits.
        config_class: Name in ``transformers``.
        architecture: Name of the causal language model in ``transformers``.
        module: The sub-module of a layer that holds gate and experts, as the checkpoint names it.
        linears: Role (``gate``, ``up``, ``down``) -> name of an expert's linear in the checkpoint.
        trunk: Patterns of the tensors beside FFNs that the class has a place for.
        always_normalizes: Whether the class always lets the chosen weights sum to 1.
        dense_layers: Whether the class can keep a plain FFN in some layers.
    """

    title: ClassVar[str]
    families: ClassVar[tuple[str, ...]]
    condition: ClassVar[str] = ""
    config_class: ClassVar[str]
    architecture: ClassVar[str]
    module: ClassVar[str] = "mlp"
    linears: ClassVar[Mapping[str, str]] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    trunk: ClassVar[tuple[str, ...]]
    always_normalizes: ClassVar[bool] = False
    dense_layers: ClassVar[bool] = False

    def gate_name(self, layer: int) -> str:
        """Return the name of a layer's router weight, shape ``(num_experts, d)``."""
        return f"model.layers.{layer}.{self.module}.gate.weight"

    def expert_name(self, layer: int, expert: int, role: str) -> str:
        """Return the name of one matrix of one expert, the anchor being expert 0."""
        return f"model.layers.{layer}.{self.module}.experts.{expert}.{self.linears[role]}.weight"

    def misfits(self, names: Iterable[str]) -> list[str]:
        """Return the tensors of a base beside its FFNs that the class has no place for."""
        allowed = re.compile("|".join(self.trunk))
        return [name for name in names if not allowed.fullmatch(name)]

    def setting_problems(self, config: Mapping[str, object]) -> list[str]:
        """Say which settings of a base (its ``config.json``) the class cannot express."""
        return []

    @abstractmethod
    def settings(
        self, *, num_experts: int, top_k: int, normalize: bool, intermediate_size: int, dense: tuple[int, ...]
    ) -> dict[str, Any]:
        """Return the settings that the class has and a dense base has not.

        Args:
            num_experts: Experts of every layer, the anchor counted.
            top_k: Experts per token, at most ``num_experts``.
            normalize: Whether the chosen weights sum to 1.
            intermediate_size: Width of every expert.
            dense: Layers that keep the base's FFN; empty unless ``dense_layers``.
        """

    def config(self, base: Any, *, dtype: str, settings: Mapping[str, Any]) -> Any:
        """Return the class's configuration: what it shares with the base's, and its own settings.

        Both configurations are built by transformers, so that defaults which the base's ``config.json`` leaves out
        are the base family's and not this class's.

        Args:
            base: The base's configuration, as transformers reads it.
            dtype: Dtype of the checkpoint, as torch spells it.
            settings: What `settings` returned.
        """
        import dataclasses

        import transformers

        own = getattr(transformers, self.config_class)
        shared = {field.name for field in dataclasses.fields(own)} - _NOT_SHARED
        given = {name: value for name, value in base.to_dict().items() if name in shared}
        if getattr(base, "head_dim", None) is not None:  # some classes read it without declaring it
            given["head_dim"] = base.head_dim
        return own(**given | dict(settings), dtype=dtype, architectures=[self.architecture])


_NOT_SHARED = frozenset(
    {"transformers_version", "architectures", "dtype", "output_hidden_states", "return_dict"}
)
