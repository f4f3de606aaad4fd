"""mergekit-moe's own YAML, every key of it, with mistakes reported where mergekit stays silent.

Knows the schema of mergekit 0.1.5 and what a reference to a model looks like; opens no model.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from experts.errors import ManifestError
from experts.strict import load_yaml, validate

__all__ = [
    "PROMPTED",
    "GateMode",
    "MoEExpert",
    "MoEManifest",
    "ModelRef",
    "is_mergekit_moe",
    "parse",
    "read_manifest",
]

GateMode = Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"]
PROMPTED = ("hidden", "hidden_avg", "hidden_last", "cheap_embed")
"""Gate modes whose router rows come from prompts."""

_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_WHAT = "mergekit-moe manifest"
_Prompts = Annotated[tuple[str, ...], Field(max_length=10_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        """Let lists stand where tuples are kept."""
        if isinstance(value, Mapping):
            return {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}
        return value


class ModelPath(_Strict):
    """A folder or a model on the hub, at a revision."""

    path: str
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        path, at, revision = value.partition("@")
        if "@" in revision:
            raise ValueError(f"{value!r} has more than one '@'; write PATH or PATH@REVISION")
        return {"path": path, "revision": revision} if at else {"path": path}

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


class ModelRef(_Strict):
    """A model, with or without an adapter that is to be added to its weights."""

    model: ModelPath
    lora: ModelPath | None = None
    override_architecture: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        model, plus, lora = value.partition("+")
        if "+" in lora:
            raise ValueError(f"{value!r} has more than one '+'; write MODEL or MODEL+ADAPTER")
        return {"model": model, "lora": lora} if plus else {"model": model}

    @field_validator("override_architecture")
    @classmethod
    def _not_overridden(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError("cannot be taken over: write the architecture into the model's config.json")
        return value

    def __str__(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora else str(self.model)


class MoEExpert(_Strict):
    """One model whose FFNs become experts."""

    source_model: ModelRef
    positive_prompts: _Prompts | None = None
    negative_prompts: _Prompts | None = None
    noise_scale: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=False)] | None = None
    """Standard deviation of normal noise that is added to every FFN weight."""
    residual_scale: Annotated[float, Field(allow_inf_nan=False, strict=False)] | None = None
    """Factor of the down projections."""


class MoEManifest(_Strict):
    """What mergekit-moe is asked for."""

    base_model: ModelRef
    """Gives everything but the FFNs."""
    experts: Annotated[tuple[MoEExpert, ...], Field(min_length=1, max_length=1024)]
    gate_mode: GateMode = "hidden"
    dtype: str | None = None
    experts_per_token: Annotated[int, Field(ge=1)] = 2
    shared_experts: tuple[MoEExpert, ...] | None = None
    architecture: str | None = None

    @field_validator("gate_mode", mode="before")
    @classmethod
    def _known_mode(cls, value: object) -> object:
        if isinstance(value, str) and value not in get_args(GateMode):
            near = difflib.get_close_matches(value, get_args(GateMode), n=1, cutoff=0.4)
            guess = f" Did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"unknown gate mode '{value}'.{guess} Known: {', '.join(get_args(GateMode))}")
        return value

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str | None) -> str | None:
        if value is not None and value.removeprefix("torch.") not in _DTYPES:
            raise ValueError(f"'{value}' is not one of {', '.join(_DTYPES)}")
        return value

    @property
    def storage_dtype(self) -> str | None:
        """The dtype that is asked for, in safetensors' spelling."""
        return None if self.dtype is None else _DTYPES[self.dtype.removeprefix("torch.")]

    @property
    def shared(self) -> MoEExpert | None:
        """The expert that every token meets; more than one is refused."""
        return self.shared_experts[0] if self.shared_experts else None

    def mistakes(self) -> list[str]:
        """Say what contradicts itself; opens nothing."""
        found = []
        if len(self.experts) < self.experts_per_token:
            found.append(
                f"experts_per_token: {self.experts_per_token}, but there are {len(self.experts)} experts"
            )
        if len(self.shared_experts or ()) > 1:
            found.append(
                "shared_experts: no class of transformers has more than one gated apart; merge them first"
            )
        return found + (self._prompt_mistakes() if self.gate_mode in PROMPTED else [])

    def _prompt_mistakes(self) -> list[str]:
        found = [
            f"experts.{position}: gate_mode '{self.gate_mode}' needs positive_prompts"
            for position, expert in enumerate(self.experts)
            if not expert.positive_prompts
        ]
        shared = self.shared
        if shared is not None and shared.negative_prompts and not shared.positive_prompts:
            found.append(
                "shared_experts.0: negative_prompts are taken from positive_prompts, and there are none"
            )
        asked = {(expert.positive_prompts, expert.negative_prompts or ()) for expert in self.experts}
        if all(e.positive_prompts for e in self.experts) and len(asked) == 1 and len(self.experts) > 1:
            found.append(
                "experts: all have the same prompts, so the router could not tell them apart; give each its own, or "
                "write `gate_mode: uniform_random` and train the router"
            )
        return found


def is_mergekit_moe(data: object) -> bool:
    """Say whether plain data are meant for mergekit-moe and not for coterie."""
    if not isinstance(data, Mapping) or "base_model" not in data or "base" in data:
        return False
    experts = data.get("experts")
    entries = experts if isinstance(experts, list) else []
    named = any(isinstance(entry, Mapping) and "source_model" in entry for entry in entries)
    return named or "gate_mode" in data or not entries


def read_manifest(path: Path) -> MoEManifest | None:
    """Read a manifest if it is one of mergekit-moe's; None if it is not, or cannot be read at all.

    Raises:
        ManifestError: It is, and has mistakes; all of them are listed.
    """
    if not path.exists():
        return None
    data = load_yaml(path, what=f"manifest {path.name}")
    if not is_mergekit_moe(data):
        return None
    return parse(data, what=f"{_WHAT} {path.name}")


def parse(data: object, *, what: str = _WHAT) -> MoEManifest:
    """Check plain data; see `read_manifest`."""
    manifest = validate(MoEManifest, data, what=what, error=ManifestError)
    problems = manifest.mistakes()
    if problems:
        raise ManifestError(f"{what}:", problems=problems)
    return manifest
