"""The expert card: who made an expert, for which anchor, from what, under which terms, and its exact files.

A frozen record with a digest of its canonical bytes. Knows the fields and their rules; knows nothing of the
registry, and reads no file of the expert.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from experts.embedding import EmbeddingSpec
from experts.errors import CardError, UnknownNameError
from experts.files import path_problems
from experts.names import check_expert_name, check_owner_name
from experts.routing_artifacts import RoutingInfo
from experts.strict import load_json, validate

__all__ = [
    "CARD_FILE",
    "BaseRef",
    "ExpertCard",
    "FileEntry",
    "Privacy",
    "Scalar",
    "Terms",
    "TrainingInfo",
]

CARD_FILE = "card.json"
"""Name of the card in an expert's folder."""
MAX_CARD_BYTES = 1 << 20

Scalar = str | int | float | bool | None
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=10_000)]
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.+-]{0,63}$")]

_FROZEN = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

_ABSOLUTE = re.compile(
    r"""
    (?:^|[\s"'`(\[<=,;:])(?:/[A-Za-z0-9_.~-]+){2,}   # /home/ann, also in a sentence; not https://x/y or a/b
    | ^/
    | (?:^|[\s"'`(\[<=,;:])~[A-Za-z0-9_.-]*/          # ~/data
    | (?<![A-Za-z])[A-Za-z]:[\\/]                    # C:\data
    | \\\\[A-Za-z0-9]                                # \\server
    | file:/
    """,
    re.VERBOSE | re.IGNORECASE,
)


class FileEntry(BaseModel):
    """One file of an expert or a base."""

    model_config = _FROZEN

    path: Annotated[str, Field(min_length=1, max_length=255)]
    """Relative to the folder, ``/`` between segments."""
    size: Annotated[int, Field(ge=0)]
    """Bytes."""
    sha256: Digest


class BaseRef(BaseModel):
    """The public anchor an expert was trained on."""

    model_config = _FROZEN

    name: Annotated[str, Field(min_length=1, max_length=200)]
    revision: Annotated[str, Field(max_length=200)] | None = None
    fingerprint: Digest
    tokenizer_fingerprint: Digest
    embedding: EmbeddingSpec | None = None
    """How the anchor makes vectors of texts; None for language models."""


class Privacy(BaseModel):
    """A differential-privacy guarantee of the training."""

    model_config = _FROZEN

    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    unit: Literal["record", "document", "user"]
    """What one neighbouring data set differs by."""
    accountant: Annotated[str, Field(min_length=1, max_length=100)]
    noise_multiplier: Annotated[float, Field(gt=0)] | None = None
    clip_norm: Annotated[float, Field(gt=0)] | None = None


class TrainingInfo(BaseModel):
    """How the expert was trained. Says what the data are, never where they lie."""

    model_config = _FROZEN

    method: Annotated[str, Field(min_length=1, max_length=100)]
    tokens: Annotated[int, Field(ge=0)] | None = None
    """Tokens trained on, with repetition; None: not known."""
    steps: Annotated[int, Field(ge=0)] | None = None
    seconds: Annotated[float, Field(ge=0)] | None = None
    settings: Annotated[dict[str, Scalar], Field(max_length=200)] = {}
    privacy: Privacy | None = None
    data_statement: Text = ""


class Terms(BaseModel):
    """What the owner allows beyond the licence; empty or None: not stated."""

    model_config = _FROZEN

    purposes: tuple[Label, ...] = ()
    jurisdictions: tuple[Label, ...] = ()
    audiences: tuple[Label, ...] = ()
    commercial: bool | None = None
    start: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")] | None = None
    not_after: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")] | None = None
    retention: Text | None = None
    allow_merge: bool | None = None
    allow_redistribute: bool | None = None
    contact: Annotated[str, Field(max_length=200)] | None = None


class ExpertCard(BaseModel):
    """Everything published about an expert besides its weights. Build new ones with `create`."""

    model_config = _FROZEN

    format_version: Literal[1]
    library_version: Annotated[str, Field(min_length=1, max_length=50)]
    name: str
    """``owner/expert``."""
    version: Annotated[int, Field(ge=1, lt=1 << 31)]
    owner: str
    domain: Label
    kind: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
    license: Annotated[str, Field(min_length=1, max_length=200)]
    """SPDX expression; checked against the SPDX list when the expert is packed and when it is registered."""
    base: BaseRef
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    """Decoder layers that the expert changes, ascending."""
    rank: Annotated[int, Field(ge=1)] | None
    """Largest rank of a low-rank expert."""
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1, max_length=64)]
    """Every file of the expert but the card itself, by ascending path."""
    training: TrainingInfo
    routing: RoutingInfo | None = None
    metrics: Annotated[dict[str, float], Field(max_length=200)] = {}
    terms: Terms = Terms()
    derived_from: tuple[Digest, ...] = ()
    """Digests of the cards of experts that this one was made from."""
    optout_class: Literal["exact", "recompose", "retrain"] = "exact"
    description: Text = ""

    @field_validator("name")
    @classmethod
    def _well_formed_name(cls, name: str) -> str:
        return _checked(check_expert_name, name)

    @field_validator("owner")
    @classmethod
    def _well_formed_owner(cls, owner: str) -> str:
        return _checked(check_owner_name, owner)

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if list(layers) != sorted(set(layers)):
            raise ValueError("layers must ascend without repetition")
        return layers

    @field_validator("files")
    @classmethod
    def _portable_paths(cls, files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
        paths = [entry.path for entry in files]
        problems = path_problems(paths)
        if CARD_FILE in paths:
            problems.append(f"{CARD_FILE} cannot list itself")
        if paths != sorted(set(paths)):
            problems.append("paths must ascend without repetition")
        if problems:
            raise ValueError("; ".join(problems))
        return files

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        owner = self.name.partition("/")[0]
        if owner != self.owner:
            raise ValueError(f"owner is '{self.owner}', but the name '{self.name}' belongs to '{owner}'")
        for path, text in _texts(self.model_dump(mode="json"), ""):
            if _ABSOLUTE.search(text):
                raise ValueError(
                    f"{path} contains the absolute path {text[:200]!r}; a card is public and names no place "
                    "on a machine"
                )
        return self

    @classmethod
    def create(cls, **fields: object) -> Self:
        """Build a card with every field spelled out, so that its digest outlives a change of defaults.

        Raises:
            CardError: Every field that breaks a rule, each with its path.
        """
        from pydantic_core import to_jsonable_python

        what = f"Card of expert '{fields.get('name', '?')}'"
        draft = validate(cls, to_jsonable_python(fields), what=what, error=CardError)
        return validate(cls, draft.model_dump(mode="json"), what=what, error=CardError)

    def to_bytes(self) -> bytes:
        """Return the canonical bytes (RFC 8785) of the fields that were given when the card was made."""
        import rfc8785

        return rfc8785.dumps(self.model_dump(mode="json", exclude_unset=True))

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 of `to_bytes`: the identity of this version of the expert."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, data: bytes, *, what: str = CARD_FILE) -> Self:
        """Read a card.

        Raises:
            CardError: Not a card (every problem is listed), or not in canonical form: then its bytes do not
                have the digest that names it.
        """
        value = load_json(data, what=what, max_bytes=MAX_CARD_BYTES, error=CardError)
        card = validate(cls, value, what=what, error=CardError)
        if card.to_bytes() != data:
            raise CardError(
                f"{what} is not in canonical form (RFC 8785): its sha256 is "
                f"{hashlib.sha256(data).hexdigest()}, the card's digest {card.digest}. Pack the expert "
                "again instead of editing its card."
            )
        return card


def _checked(check: object, name: str) -> str:
    try:
        return check(name)  # type: ignore[operator, no-any-return]
    except UnknownNameError as failure:
        raise ValueError(str(failure)) from None


def _texts(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield f"a key of {path or 'the card'}", str(key)
            yield from _texts(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from _texts(inner, f"{path}.{position}")
