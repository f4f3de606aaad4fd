"""Kind ``retriever``: a PEFT LoRA adapter on the query side of an embedding model; documents stay the base's.

The same files and rules as for language models (`experts.kinds.lora`), on an encoder's linears. Knows nothing of
torch, of documents or of how a query finds its expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from experts.base import BaseDescription
from experts.card import BaseRef
from experts.kinds.lora import AdapterKind, LoraSpec, lora_spec

__all__ = ["RetrieverKind", "retriever_spec"]


def retriever_spec(config: Mapping[str, object], base: BaseDescription) -> LoraSpec:
    """Resolve the ``adapter_config.json`` of a retriever: its linears, their ranks, scalings and layers.

    Raises:
        AdmissionError: A key that is not allowed, a target that is not a linear of the encoder's layers, or a base that
            is no embedding model; every offender is listed.
    """
    RetrieverKind().check_base(base)
    return lora_spec(config, base)


@final
class RetrieverKind(AdapterKind):
    """PEFT LoRA adapters on embedding models."""

    name = "retriever"
    embeds = True

    def sanitize_config(self, config: Mapping[str, object], base_ref: BaseRef) -> dict[str, object]:
        """As for language models; the class that PEFT notes where no task is given is left out, nothing imports it."""
        return {**super().sanitize_config(config, base_ref), "auto_mapping": None}
