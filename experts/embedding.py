"""What makes an encoder an embedding model: pooling, normalisation, similarity, longest input, prompts.

Read strictly from a sentence-transformers folder. Knows its small JSON files and the two spellings they have had;
knows nothing of tensors, and imports no sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from experts.errors import AdmissionError
from experts.files import capped
from experts.strict import load_json

__all__ = ["EMBEDDING_FILES", "EmbeddingSpec", "embedding_differences", "read_embedding"]

EMBEDDING_FILES = (
    "1_Pooling/config.json",
    "2_Normalize/config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "sentence_bert_config.json",
)
"""The files beside an encoder's checkpoint that make it an embedding model; the second one may be absent."""

Pooling = Literal["cls", "max", "mean", "mean_sqrt_len_tokens"]

_MAX_BYTES = 1 << 16
_TYPES = {
    "transformer": (
        "sentence_transformers.models.Transformer",
        "sentence_transformers.base.modules.transformer.Transformer",
    ),
    "pooling": (
        "sentence_transformers.models.Pooling",
        "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    ),
    "normalize": (
        "sentence_transformers.models.Normalize",
        "sentence_transformers.base.modules.normalize.Normalize",
    ),
}
_PATHS = {"transformer": "", "pooling": "1_Pooling", "normalize": "2_Normalize"}
_POOLING_FLAGS: dict[str, Pooling | None] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": None,
    "pooling_mode_lasttoken": None,
}
_POOLINGS: tuple[Pooling, ...] = ("cls", "max", "mean", "mean_sqrt_len_tokens")
_TEXT_MODALITY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
_SAVE_AGAIN = "save the model again with SentenceTransformer.save_pretrained"


class EmbeddingSpec(BaseModel):
    """How a text becomes a vector and how two vectors are compared; part of an embedding base's identity.

    Two bases with equal tensors and another one of these give other rankings, so an expert for one is none for the
    other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    pooling: Pooling
    """How the token states of the last layer become one vector."""
    normalize: bool
    """Whether the pooled vector is divided by its length."""
    similarity: Literal["cosine", "dot"]
    max_seq_length: Annotated[int, Field(ge=2, le=1 << 17)]
    """Tokens after which a text is cut off, special tokens among them."""
    dimension: Annotated[int, Field(ge=1, le=1 << 16)]
    """Length of an embedding."""
    prompts: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=2000)]],
        Field(max_length=16),
    ] = {}
    """Texts put before the input, by name (``query``, ``document``); empty ones are left out."""


def embedding_differences(expected: EmbeddingSpec, found: EmbeddingSpec, *, of: tuple[str, str]) -> list[str]:
    """Return one line for each setting in which two embedding models differ.

    Args:
        expected: One model's.
        found: The other's.
        of: How to call the two, for instance ``("the expert's base", "the base at hand")``.
    """
    left, right = expected.model_dump(), found.model_dump()
    return [
        f"{name}: {left[name]!r} in {of[0]}, {right[name]!r} in {of[1]}"
        for name in EmbeddingSpec.model_fields
        if left[name] != right[name]
    ]


def read_embedding(folder: Path, *, config: Mapping[str, object], hidden_size: int) -> EmbeddingSpec:
    """Read the embedding settings of a sentence-transformers folder; nothing that is not understood is let pass.

    Args:
        folder: Holds the `EMBEDDING_FILES` and ``tokenizer_config.json``.
        config: The encoder's ``config.json``.
        hidden_size: Width of the encoder.

    Raises:
        AdmissionError: A file is missing or says something that is not allowed; every offender is listed.
    """
    if not (folder / "modules.json").exists():
        raise AdmissionError(
            f"'{folder}' holds an encoder (model_type {config.get('model_type')!r}) without modules.json. An encoder "
            "is a base for retrievers, as a sentence-transformers folder: modules.json, 1_Pooling/config.json, "
            f"sentence_bert_config.json, config_sentence_transformers.json. Load it with sentence-transformers and "
            "save it with save_pretrained."
        )
    reader = _Reader(folder)
    normalize = reader.modules()
    reader.transformer()
    pooling = reader.pooling(hidden_size)
    if normalize:
        reader.normalize()
    similarity, prompts = reader.settings()
    longest = reader.longest(config)
    if reader.problems:
        raise AdmissionError(
            f"'{folder}' is not an embedding model that is understood:", problems=capped(reader.problems)
        )
    return EmbeddingSpec(
        pooling=pooling,
        normalize=normalize,
        similarity=similarity,
        max_seq_length=longest,
        dimension=hidden_size,
        prompts=prompts,
    )


class _Reader:
    """Reads the files one after the other and collects what is wrong; what it returns then is of no use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.problems: list[str] = []

    def _load(self, name: str, *, needed: bool = True) -> dict[str, object]:
        path = self._folder / name
        if not path.exists():
            if needed:
                self.problems.append(f"{name}: missing; {_SAVE_AGAIN}")
            return {}
        value = load_json(path, what=name, max_bytes=_MAX_BYTES, error=AdmissionError)
        if not isinstance(value, dict):
            self.problems.append(f"{name}: not a JSON object; {_SAVE_AGAIN}")
            return {}
        return value

    def _only(
        self, file: str, found: Mapping[str, object], allowed: Mapping[str, tuple[object, ...]]
    ) -> None:
        """Every key must be listed, and have a listed value where values are listed."""
        for key, value in found.items():
            if key not in allowed:
                self.problems.append(f"{file}: key {key!r} is not understood; known are {', '.join(allowed)}")
            elif allowed[key] and not any(type(v) is type(value) and v == value for v in allowed[key]):
                options = " or ".join(repr(option) for option in allowed[key])
                self.problems.append(f"{file}: {key} is {value!r}; allowed is {options}")

    def modules(self) -> bool:
        """Whether the third of the modules, which normalises, is there."""
        listed = load_json(
            self._folder / "modules.json", what="modules.json", max_bytes=_MAX_BYTES, error=AdmissionError
        )
        roles = [
            role for role in _TYPES if isinstance(listed, list) and len(listed) > list(_TYPES).index(role)
        ]
        expected = [
            {"idx": position, "name": str(position), "path": _PATHS[role]}
            for position, role in enumerate(roles)
        ]
        fitting = (
            isinstance(listed, list)
            and 2 <= len(listed) <= len(_TYPES)
            and all(
                isinstance(module, dict)
                and module == {**plain, "type": module.get("type")}
                and module["type"] in _TYPES[role]
                for module, plain, role in zip(listed, expected, roles, strict=True)
            )
        )
        if not fitting:
            types = (
                [m.get("type") if isinstance(m, dict) else m for m in listed]
                if isinstance(listed, list)
                else listed
            )
            self.problems.append(
                f"modules.json: {types!r:.300} found; allowed are a Transformer (path ''), a Pooling (path "
                f"'1_Pooling') and, or not, a Normalize (path '2_Normalize'), each with idx, name, path and type"
            )
        return len(roles) == len(_TYPES)

    def transformer(self) -> None:
        name = "sentence_bert_config.json"
        allowed: dict[str, tuple[object, ...]] = {
            "max_seq_length": (),
            "do_lower_case": (False,),
            "transformer_task": ("feature-extraction",),
            "modality_config": (_TEXT_MODALITY,),
            "module_output_name": ("token_embeddings",),
        }
        self._only(name, self._load(name), allowed)

    def pooling(self, hidden_size: int) -> Pooling:
        name = "1_Pooling/config.json"
        found = self._load(name)
        width = ("word_embedding_dimension", "embedding_dimension")
        allowed: dict[str, tuple[object, ...]] = {
            **dict.fromkeys(width, (hidden_size,)),
            "pooling_mode": _POOLINGS,
            **{flag: (True, False) if mode else (False,) for flag, mode in _POOLING_FLAGS.items()},
            "include_prompt": (True,),
        }
        self._only(name, found, allowed)
        if found and not any(key in found for key in width):
            self.problems.append(f"{name}: no embedding_dimension; {_SAVE_AGAIN}")
        flagged = [mode for flag, mode in _POOLING_FLAGS.items() if mode and found.get(flag) is True]
        modes = [mode for mode in _POOLINGS if mode == found.get("pooling_mode")] or flagged
        if len(modes) != 1 or (flagged and flagged != modes):
            self.problems.append(
                f"{name}: one way of pooling is needed, {' and '.join(modes) or 'none'} found; known are "
                f"{', '.join(_POOLINGS)}"
            )
        return modes[0] if modes else "mean"

    def normalize(self) -> None:
        name = "2_Normalize/config.json"
        key = ("sentence_embedding",)
        self._only(
            name, self._load(name, needed=False), {"module_input_name": key, "module_output_name": key}
        )

    def settings(self) -> tuple[Literal["cosine", "dot"], dict[str, str]]:
        name = "config_sentence_transformers.json"
        found = self._load(name)
        allowed: dict[str, tuple[object, ...]] = {
            "__version__": (),
            "model_type": ("SentenceTransformer",),
            "prompts": (),
            "default_prompt_name": (None,),
            "similarity_fn_name": ("cosine", "dot", None),
        }
        self._only(name, found, allowed)
        prompts = found.get("prompts") or {}
        if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
            self.problems.append(f"{name}: prompts must be texts by name")
            prompts = {}
        kept = {key: text for key, text in sorted(prompts.items()) if text}
        # without a name the library compares by cosine
        return "dot" if found.get("similarity_fn_name") == "dot" else "cosine", kept

    def longest(self, config: Mapping[str, object]) -> int:
        """The cut that sentence-transformers makes: its own setting, else the tokenizer's, within the positions."""
        own = self._load("sentence_bert_config.json").get("max_seq_length")
        positions = config.get("max_position_embeddings")
        within = positions if type(positions) is int else 1 << 17
        where = "sentence_bert_config.json: max_seq_length"
        if own is None:
            where = "tokenizer_config.json: model_max_length"
            own = self._load("tokenizer_config.json").get("model_max_length")
            # a tokenizer without a limit of its own stores a huge number
            own = min(own, within) if isinstance(own, int) and not isinstance(own, bool) else own
        if type(own) is not int or not 2 <= own <= within:
            self.problems.append(
                f"{where} is {own!r}; a whole number from 2 to the encoder's {within} positions is needed"
            )
            return 2
        return own
