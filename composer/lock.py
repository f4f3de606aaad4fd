"""``composition.json``: what exactly a composed folder is made of, and whose each file is.

Knows digests, owners and indices; opens no tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from composer.manifest import RouterSpec, UpcycleSpec
from experts.card import FileEntry
from experts.errors import BuildError
from experts.routing_artifacts import RoutingInfo
from experts.strict import load_json, validate

__all__ = [
    "LOCK_NAME",
    "MAX_LOCK_BYTES",
    "TUNED_FOLDER",
    "Lock",
    "LockedBase",
    "LockedExpert",
    "LockedRows",
    "LockedTuning",
    "OptOutClass",
    "TrainedParts",
]

LOCK_NAME = "composition.json"
TUNED_FOLDER = "tuned"
MAX_LOCK_BYTES = 16 << 20

OptOutClass = Literal["exact", "recompose", "retrain"]
"""``exact``: no stored tensor mixes owners. ``recompose``: some do, and leaving rebuilds them. ``retrain``: jointly
trained weights; leaving needs a state from before."""


TrainedParts = Literal["routers", "trunk", "all"]
"""What was trained after composing: ``routers``; ``trunk``: routers and whatever is no expert; ``all``: everything."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LockedBase(_Strict):
    """The public anchor of a composition."""

    name: str
    fingerprint: str
    tokenizer_fingerprint: str
    files: tuple[FileEntry, ...]
    """Under ``base/``."""
    routing: RoutingInfo | None
    """The public routing artefacts, under ``public/``; nobody owns them."""
    routing_sha256: str | None


class LockedExpert(_Strict):
    """One expert of a composition."""

    name: str
    version: int
    owner: str
    digest: str
    """SHA-256 of its card; the folder is ``experts/<digest>``."""
    kind: str
    domain: str
    license: str
    layers: tuple[int, ...]
    parameters: int
    files: tuple[FileEntry, ...]
    positive_prompts: tuple[str, ...] = ()
    """What the manifest said of its domain, where the scorer asks for it."""
    negative_prompts: tuple[str, ...] = ()
    parent_owners: tuple[str, ...] = ()
    """Other owners of the experts that this one was made from, directly or not, sorted."""

    @model_serializer(mode="wrap")
    def _without_absent_parts(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        optional = ("positive_prompts", "negative_prompts", "parent_owners")
        return {key: value for key, value in data.items() if value or key not in optional}

    @property
    def whose(self) -> frozenset[str]:
        """Everybody whose leaving takes this expert along: its owner and those from whose experts it was made."""
        return frozenset((self.owner, *self.parent_owners))

    @property
    def folder(self) -> str:
        """Where its files are, relative to the composed folder."""
        return f"experts/{self.digest}"


class LockedRows(_Strict):
    """Router rows of an expert that joined after a tuning, which knows nothing of them."""

    expert: str
    beside: tuple[str, ...]
    """Experts whose rows or published artefacts they were computed from, sorted."""
    new_rows: str
    """How: a name of `composer.upcycling.growth.NEW_ROWS`."""
    file: FileEntry
    """Under ``tuned/``: a row ``(d,)`` for every router, by the name of its rows."""


class LockedTuning(_Strict):
    """Weights that were trained after composing; they stand in files of their own, beside what they started from."""

    trained: TrainedParts
    files: tuple[FileEntry, ...]
    """Under ``tuned/``."""
    owners: tuple[str, ...]
    """Whose text or experts the weights were computed from, sorted: every one of them is in every tensor."""
    text_owners: tuple[str, ...]
    """Whose text was trained on, sorted."""
    optout_class: OptOutClass
    """Of the composition before."""
    settings: dict[str, str | int | float | bool | None]
    """The job without its paths."""
    grown: tuple[LockedRows, ...] = ()
    """Experts that joined afterwards, in that order; ``owners`` are not theirs."""

    @model_serializer(mode="wrap")
    def _without_nobody(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        return {key: value for key, value in data.items() if value or key != "grown"}

    @property
    def all_files(self) -> tuple[FileEntry, ...]:
        """What was tuned, and the rows of those who joined afterwards."""
        return (*self.files, *(rows.file for rows in self.grown))

    def trimmed(self, experts: Collection[str]) -> Self | None:
        """Return the tuning without experts that joined afterwards; None where it, or rows that stay, hold them."""
        staying = tuple(rows for rows in self.grown if rows.expert not in experts)
        joined = {rows.expert for rows in self.grown}
        if set(experts) - joined or any(set(rows.beside) & set(experts) for rows in staying):
            return None
        return self.model_copy(update={"grown": staying})


class Lock(_Strict):
    """The whole of a composition."""

    format_version: Literal[1] = 1
    library_version: str
    name: str
    recipe: str
    manifest_sha256: str
    base: LockedBase
    router: RouterSpec
    upcycle: UpcycleSpec | None = None
    """How dense models become one mixture, written out; null for other recipes."""
    dtype: str | None
    experts: tuple[LockedExpert, ...]
    """In canonical order, which is by name; the id of the first one is 1."""
    optout_class: OptOutClass
    lineage: dict[str, tuple[str, ...]]
    """Path inside the folder -> the owners whose data it was computed from."""
    tuned: LockedTuning | None = None
    """What was trained after composing, if anything; it counts only where nobody is left out."""

    @model_serializer(mode="wrap")
    def _without_absent_parts(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave keys out that say nothing: libraries that do not know them can read such folders."""
        data: dict[str, Any] = handler(self)
        return {
            key: value for key, value in data.items() if value is not None or key not in ("tuned", "upcycle")
        }

    @property
    def involved(self) -> tuple[str, ...]:
        """Everybody whose experts or text are in here, sorted."""
        return tuple(sorted({*self.composed_owners, *(self.tuned.owners if self.tuned else ())}))

    @property
    def composed_owners(self) -> tuple[str, ...]:
        """Every owner of an expert, and of an expert that one of these was made from, sorted."""
        return tuple(sorted({owner for expert in self.experts for owner in expert.whose}))

    @property
    def untuned(self) -> Self:
        """The lock of the composition as it was before any tuning."""
        if self.tuned is None:
            return self
        files = {f"{TUNED_FOLDER}/{entry.path}" for entry in self.tuned.all_files}
        return self.model_copy(
            update={
                "tuned": None,
                "optout_class": self.tuned.optout_class,
                "lineage": {path: who for path, who in self.lineage.items() if path not in files},
            }
        )

    @property
    def owners(self) -> tuple[str, ...]:
        """Every owner of the composition, sorted."""
        return tuple(sorted({expert.owner for expert in self.experts}))

    def without(self, owners: Collection[str]) -> Self:
        """Return the lock of the composition that these owners never joined; its manifest is still everybody's.

        What was tuned holds everybody who was there, so it stays only where those who leave joined afterwards.
        """
        kept = self if self.tuned is None else self._tuned_without(owners)
        experts = tuple(expert for expert in kept.experts if expert.whose.isdisjoint(owners))
        lineage = {path: who for path, who in kept.lineage.items() if not set(who) & set(owners)}
        gone = {expert.name for expert in kept.experts} - {expert.name for expert in experts}
        upcycle = kept.upcycle and kept.upcycle.without(gone)
        return kept.model_copy(update={"experts": experts, "lineage": lineage, "upcycle": upcycle})

    def leaving_owners(self, experts: Collection[str]) -> frozenset[str]:
        """Return the owners of whom no expert holds anything any more once these are gone."""
        staying = {owner for expert in self.experts if expert.name not in experts for owner in expert.whose}
        return frozenset(self.composed_owners) - staying

    def trimmed_tuning(self, experts: Collection[str], *, owners: Collection[str]) -> LockedTuning | None:
        """Return what stays tuned once these are gone; None: nothing, since it holds something of theirs."""
        if self.tuned is None or set(owners) & set(self.tuned.owners):
            return None
        return self.tuned.trimmed(experts)

    def _tuned_without(self, owners: Collection[str]) -> Self:
        leaving = {expert.name for expert in self.experts if not expert.whose.isdisjoint(owners)}
        trimmed = self.trimmed_tuning(leaving, owners=owners)
        return self.untuned if trimmed is None else self.model_copy(update={"tuned": trimmed})

    def to_bytes(self) -> bytes:
        """Return the file's bytes: indented JSON with a fixed order of keys."""
        return (self.model_dump_json(indent=2) + "\n").encode()

    @property
    def membership_digest(self) -> str:
        """SHA-256 over what decides the logits: base, recipe, router, public artefacts, experts and tuned files."""
        parts = [
            self.base.fingerprint,
            self.base.routing_sha256 or "",
            self.recipe,
            self.router.model_dump_json(),
            *(expert.digest for expert in self.experts),
            *(entry.sha256 for entry in (self.tuned.all_files if self.tuned else ())),
        ]
        if self.upcycle is not None:
            parts.append(self.upcycle.model_dump_json())
        parts += [f"{e.positive_prompts}{e.negative_prompts}" for e in self.experts if e.positive_prompts]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the lock of a composed folder.

        Raises:
            BuildError: There is none, or it is not well formed.
        """
        path = folder / LOCK_NAME
        if not path.is_file():
            advice = (
                "It is a plain checkpoint: load it with transformers; it does not know its owners."
                if (folder / "config.json").is_file()
                else "Make one with `coterie build`."
            )
            raise BuildError(f"{folder} is not a composed folder: it has no {LOCK_NAME}. {advice}")
        data = load_json(path, what=str(path), max_bytes=MAX_LOCK_BYTES, error=BuildError)
        recipe = data.get("recipe") if isinstance(data, dict) else None
        return validate(cls.of_recipe(recipe), data, what=str(path), error=BuildError)

    @classmethod
    def of_recipe(cls, recipe: object) -> type[Self]:
        """Return the class of a recipe's locks, which differ in what ``router`` may say."""
        from composer.recipes import RECIPES

        if cls is not Lock or not isinstance(recipe, str) or recipe not in RECIPES:
            return cls
        found: type[Self] = RECIPES.load(recipe).lock
        return found
