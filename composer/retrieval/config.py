"""The configuration of a routed query encoder: the base encoder's own, and which composition wraps it."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

__all__ = ["RetrieverConfig"]


class RetrieverConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration with ``model_type: coterie_retriever``.

    Args:
        base_config: The encoder's configuration, as an object or as the dict of its ``config.json``.
        composition: Digest of the composition's lock, hexadecimal; None before it is known.
    """

    model_type = "coterie_retriever"
    sub_configs: ClassVar[dict[str, type]] = {"base_config": AutoConfig}

    def __init__(
        self,
        base_config: PreTrainedConfig | dict[str, Any] | None = None,
        composition: str | None = None,
        **kwargs: Any,
    ) -> None:
        base: Any = AutoConfig.for_model(**base_config) if isinstance(base_config, dict) else base_config
        self.base_config = base
        self.composition = composition
        if base is not None:
            # what sentence-transformers reads of any encoder's configuration
            self.hidden_size = base.hidden_size
            self.max_position_embeddings = getattr(base, "max_position_embeddings", -1)
            kwargs.setdefault("pad_token_id", getattr(base, "pad_token_id", None))
            kwargs.setdefault("tokenizer_class", _tokenizer_class(base.model_type))
        super().__init__(**kwargs)


def _tokenizer_class(model_type: str) -> str | None:
    """Name the encoder's usual tokenizer, for folders whose tokenizer_config.json does not."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    named = TOKENIZER_MAPPING_NAMES.get(model_type)
    name = next((part for part in reversed(named) if part), None) if isinstance(named, tuple) else named
    return name if isinstance(name, str) else None
