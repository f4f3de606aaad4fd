"""The configuration of a composed model: the base model's own configuration and which composition wraps it."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

__all__ = ["ComposedConfig"]


class ComposedConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration with ``model_type: coterie``.

    Args:
        base_config: The anchor's configuration, as an object or as the dict of its ``config.json``.
        composition: Digest of the composition's lock, hexadecimal; None before it is known.
    """

    model_type = "coterie"
    sub_configs: ClassVar[dict[str, type]] = {"base_config": AutoConfig}

    def __init__(
        self,
        base_config: PreTrainedConfig | dict[str, Any] | None = None,
        composition: str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(base_config, dict):
            base_config = AutoConfig.for_model(**base_config)
        self.base_config: Any = base_config
        self.composition = composition
        if base_config is not None:
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
                kwargs.setdefault(name, getattr(base_config, name, None))
        super().__init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Return the base model's text configuration, which caches and generation read."""
        if self.base_config is None:
            return self
        return self.base_config.get_text_config(decoder=decoder, encoder=encoder)
