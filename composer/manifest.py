"""The manifest: the YAML in which a builder says which experts become one model, and how.

Knows keys and their types; whether the names exist is the plan's business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
)

from experts.errors import ManifestError
from experts.names import check_owner_name, parse_reference
from experts.strict import load_yaml, validate

__all__ = ["AttentionSpec", "ExpertEntry", "Manifest", "RouterSpec", "TrunkSpec", "UpcycleSpec"]


_OWN_ROUTERS = frozenset({"btx", "bam", "sparse_upcycle"})
"""Recipes whose router is not `RouterSpec`'s where the manifest says nothing."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ExpertEntry(_Strict):
    """One expert of a composition."""

    ref: str
    """``owner/expert``, ``owner/expert@VERSION`` or ``owner/expert@sha256:<card digest>``."""
    positive_prompts: tuple[str, ...] = ()
    """Texts of the expert's domain, for a scorer that is made of prompts."""
    negative_prompts: tuple[str, ...] = ()
    """Texts that such a scorer should keep away from the expert."""

    @field_validator("positive_prompts", "negative_prompts", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave prompts out where there are none."""
        data: dict[str, Any] = handler(self)
        return {key: value for key, value in data.items() if value or key == "ref"}

    @field_validator("ref")
    @classmethod
    def _well_formed(cls, ref: str) -> str:
        try:
            parse_reference(ref)
        except Exception as error:
            raise ValueError(str(error)) from None
        return ref


class RouterSpec(_Strict):
    """How tokens find their experts: a context, a scorer and a selector."""

    preset: Literal["paper"] | None = None
    """``paper``: FlexOlmo as published. Other keys win over the preset; the plan and the lock hold it written out."""
    scorer: str = "lda"
    """``lda`` and ``ridge``: solved from the owners' additive statistics, no training; ``learned``: the owners'
    trained rows."""
    context: Literal["prompt_mean", "running_mean", "token"] = "running_mean"
    """What is scored: the mean of all states up to the token, that mean up to the prompt's end (which lets the prompt
    decide about all that is generated), or the token's state alone."""
    token_weight: float = Field(default=0.0, ge=0, lt=1)
    """Share of the token's own state in what is scored, beside the mean of a context that has one."""
    selector: str = "topk"
    """How logits become choices. ``topk``: the ``top_k`` most probable experts; ``topp``: as few of them as hold
    ``top_p`` of the probability."""
    top_k: int = Field(default=2, ge=1)
    """Experts per token, the anchor counted; fewer where fewer are allowed."""
    normalize: bool = True
    """Whether the chosen weights sum to 1. Only post-norm bases (OLMo-2) can do without."""
    layer: int | None = Field(default=None, ge=0)
    """Decoder layer whose input a model-wide scorer reads; null: where the owners took their statistics."""
    options: dict[str, float | int | str | bool | None] = {}
    """Settings of the scorer, for instance ``{shrinkage: 0.1}``."""
    selector_options: dict[str, float | int | str | bool | None] = {}
    """Settings of the selector, for instance ``{top_p: 0.8}``."""
    public_prompts: tuple[str, ...] = ()
    """Texts that are nobody's, for a scorer that is made of prompts."""

    @field_validator("public_prompts", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_serializer(mode="wrap")
    def _beside_the_preset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave unwritten keys out beside a preset: read back, they would be taken for the builder's wish."""
        data: dict[str, Any] = handler(self)
        if not self.public_prompts:
            data.pop("public_prompts", None)
        if self.preset is None:
            return data
        return {key: value for key, value in data.items() if key in self.model_fields_set}


class TrunkSpec(_Strict):
    """How the tensors that no expert has of its own are merged from the dense models."""

    method: str = "average"
    """``average``: the mean of all models; or a merge method of mergekit, by its name."""
    weights: dict[str, float] = {}
    """``owner/expert``, or ``base``, to its weight; 1 where nothing is said."""
    parameters: dict[str, float | int | str | bool | dict[str, float]] = {}
    """Settings of the method; one value, or values by ``owner/expert`` where the method allows it."""

    @field_validator("parameters", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        for key, one in value.items() if isinstance(value, dict) else ():
            if isinstance(one, list) or one is None:
                raise ValueError(
                    f"'{key}' is {'a list' if one else 'empty'}; write one value for all layers, or values by "
                    "owner/expert"
                )
        return value

    def without(self, names: Collection[str]) -> TrunkSpec:
        """Return what is left of it when experts leave: as if it had never named them."""

        def kept(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in values.items() if name not in names}

        parameters = {k: kept(v) if isinstance(v, dict) else v for k, v in self.parameters.items()}
        return self.model_copy(update={"weights": kept(self.weights), "parameters": parameters})


class AttentionSpec(_Strict):
    """How attention becomes experts (recipe ``bam``)."""

    kv: Literal["own", "shared"] = "shared"
    """``own``: every expert has its own keys and values, and a cache of them; ``shared``: all use the trunk's."""
    top_k: int | None = Field(default=None, ge=1)
    """Experts whose answers are mixed; null: all of them (soft routing)."""


class UpcycleSpec(_Strict):
    """How dense models become one mixture (recipes ``btx``, ``bam`` and ``sparse_upcycle``)."""

    trunk: Literal["frozen"] | TrunkSpec | None = None
    """What is not expert: ``frozen``, the base's own tensors, so that opting out is exact; or merged from the base and
    the experts (``average``, or ``{method: ..., weights: ...}``), so that opting out merges the others anew."""
    seed_expert: bool | None = None
    """Whether the base, from which the experts were branched, is one more expert."""
    attention: AttentionSpec | None = None
    """Attention experts (``bam``)."""
    copies: int | None = Field(default=None, ge=2)
    """Copies of the one model (``sparse_upcycle``)."""

    def without(self, names: Collection[str]) -> UpcycleSpec:
        """Return what is left of it when experts leave; see `TrunkSpec.without`."""
        if not isinstance(self.trunk, TrunkSpec):
            return self
        return self.model_copy(update={"trunk": self.trunk.without(names)})

    @field_validator("trunk", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in ("average", "frozen"):
            raise ValueError(
                f"'{value}' is neither 'frozen' nor 'average'; other ways to merge are mappings, for instance "
                "{method: ties, parameters: {density: 0.5}}"
            )
        return {"method": "average"} if value == "average" else value


class Manifest(_Strict):
    """A composition as its builder wants it."""

    format_version: Literal[1] = 1
    """Version of this format."""
    name: str
    """Name of the composed model."""
    recipe: str = "flexolmo"
    """How the experts become one model."""
    base: str
    """Name of the public anchor in the registry."""
    experts: tuple[ExpertEntry, ...]
    """The experts, as references or as mappings with ``ref``."""
    opt_out: tuple[str, ...] = ()
    """Owners to leave out although their experts are listed."""
    router: RouterSpec = RouterSpec()
    """How tokens find their experts."""
    upcycle: UpcycleSpec | None = None
    """How dense models become one mixture; null: the recipe's defaults, or a recipe that takes none."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype the model is loaded in unless asked otherwise; null: the anchor's own."""
    description: str = ""
    """Free text for the model card."""

    @field_validator("experts", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            if not value:  # counted here: pydantic would count the well-formed entries only
                raise ValueError("name at least one expert")
            return tuple({"ref": entry} if isinstance(entry, str) else entry for entry in value)
        return value

    @field_validator("opt_out", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("opt_out")
    @classmethod
    def _owner_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for owner in value:
            try:
                check_owner_name(owner)
            except Exception as error:
                raise ValueError(str(error)) from None
        return value

    @model_serializer(mode="wrap")
    def _without_what_is_not_asked(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave ``upcycle`` out where nothing is said, so that other recipes' digests do not know of it.

        A recipe with a router of its own takes what is not written for its own default, so unwritten keys stay so.
        """
        data: dict[str, Any] = handler(self)
        if data.get("upcycle", ...) is None:
            del data["upcycle"]
        if self.recipe in _OWN_ROUTERS and isinstance(data.get("router"), dict):
            written = self.router.model_fields_set
            data["router"] = {key: value for key, value in data["router"].items() if key in written}
        return data

    @classmethod
    def from_file(cls, path: Path | str) -> Self:
        """Read a manifest.

        Raises:
            ManifestError: The file is missing, is not plain YAML, or has mistakes; all of them are listed.
        """
        path = Path(path)
        what = f"manifest {path.name}"
        if not path.exists():
            raise ManifestError(f"There is no manifest at {path}.")
        return cls.from_dict(load_yaml(path, what=what), what=what)

    @classmethod
    def from_dict(cls, data: object, *, what: str = "manifest") -> Self:
        """Check plain data against the manifest's format; see `from_file`."""
        if not isinstance(data, Mapping):
            raise ManifestError(f"{what}: not a mapping; write 'name:', 'base:' and 'experts:'.")
        return validate(cls.of_recipe(data.get("recipe")), data, what=what)

    @classmethod
    def of_recipe(cls, recipe: object) -> type[Self]:
        """Return the class of a recipe's manifests, which differ in what ``router`` may say.

        Args:
            recipe: The name as it was written; one that is unknown is the plan's business.
        """
        from composer.recipes import RECIPES

        if cls is not Manifest or not isinstance(recipe, str) or recipe not in RECIPES:
            return cls
        found: type[Self] = RECIPES.load(recipe).manifest
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `from_dict` reads back."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of the manifest's canonical JSON."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
