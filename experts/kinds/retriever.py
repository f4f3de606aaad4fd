"""Kind ``retriever``: an expert on the query side of an embedding model; documents stay the base's.

It takes two forms: a PEFT LoRA adapter, with the same files and rules as for language models (`experts.kinds.lora`), on
an encoder's linears; or a whole query encoder with its tokenizer (`experts.kinds.retriever_full`). Knows nothing of
torch, of documents or of how a query finds its expert.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import final

from experts.base import BaseDescription
from experts.card import BaseRef
from experts.errors import AdmissionError
from experts.kinds.kind import ExpertKind
from experts.kinds.lora import AdapterKind, LoraSpec, lora_spec
from experts.kinds.retriever_full import FullEncoderKind

__all__ = ["RetrieverKind", "is_full_encoder", "retriever_spec"]

_FULL = FullEncoderKind()


def retriever_spec(config: Mapping[str, object], base: BaseDescription) -> LoraSpec:
    """Resolve the ``adapter_config.json`` of a retriever: its linears, their ranks, scalings and layers.

    Raises:
        AdmissionError: A key that is not allowed, a target that is not a linear of the encoder's layers, or a base that
            is no embedding model; every offender is listed.
    """
    RetrieverKind().check_base(base)
    return lora_spec(config, base)


def is_full_encoder(files: Collection[str]) -> bool:
    """Say whether an admitted retriever with these files is a whole query encoder, not an adapter."""
    return _FULL.weights_file in files


@final
class RetrieverKind(AdapterKind):
    """PEFT LoRA adapters on embedding models; `form` gives whole query encoders."""

    name = "retriever"
    embeds = True

    @property
    def forms(self) -> tuple[ExpertKind, ...]:
        """An adapter, a whole query encoder."""
        return (self, _FULL)

    def form(self, files: Collection[str]) -> ExpertKind:
        """Return the form that has these files, told by the configuration's name.

        Raises:
            AdmissionError: Both configurations are among them.
        """
        if _FULL.config_file not in files:
            return self
        if self.config_file in files:
            raise AdmissionError(
                f"A retriever is either an adapter ({self.config_file}, {self.weights_file}) or a whole query encoder "
                f"({', '.join(_FULL.files)}); files of both are here. Keep those of one."
            )
        return _FULL

    def detect(self, folder: Path) -> bool:
        """Say whether the folder holds the files of either form (whatever is in them)."""
        return super().detect(folder) or _FULL.detect(folder)

    def sanitize_config(self, config: Mapping[str, object], base_ref: BaseRef) -> dict[str, object]:
        """As for language models; the class that PEFT notes where no task is given is left out, nothing imports it."""
        return {**super().sanitize_config(config, base_ref), "auto_mapping": None}
