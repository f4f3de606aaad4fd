"""``composition.json``: what exactly a composed folder is made of, and whose each file is.

Knows digests, owners and indices; opens no tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from composer.manifest import RouterSpec
from experts.card import FileEntry
from experts.errors import BuildError
from experts.routing_artifacts import RoutingInfo
from experts.strict import load_json, validate

__all__ = ["LOCK_NAME", "MAX_LOCK_BYTES", "Lock", "LockedBase", "LockedExpert", "OptOutClass"]

LOCK_NAME = "composition.json"
MAX_LOCK_BYTES = 16 << 20

OptOutClass = Literal["exact", "recompose", "retrain"]
"""``exact``: no stored tensor mixes owners. ``recompose``: some do, and leaving rebuilds them. ``retrain``: jointly
trained weights; leaving needs a state from before."""


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

    @property
    def folder(self) -> str:
        """Where its files are, relative to the composed folder."""
        return f"experts/{self.digest}"


class Lock(_Strict):
    """The whole of a composition."""

    format_version: Literal[1] = 1
    library_version: str
    name: str
    recipe: str
    manifest_sha256: str
    base: LockedBase
    router: RouterSpec
    dtype: str | None
    experts: tuple[LockedExpert, ...]
    """In canonical order, which is by name; the id of the first one is 1."""
    optout_class: OptOutClass
    lineage: dict[str, tuple[str, ...]]
    """Path inside the folder -> the owners whose data it was computed from."""

    @property
    def owners(self) -> tuple[str, ...]:
        """Every owner of the composition, sorted."""
        return tuple(sorted({expert.owner for expert in self.experts}))

    def without(self, owners: Collection[str]) -> Self:
        """Return the lock of the composition that these owners never joined."""
        experts = tuple(expert for expert in self.experts if expert.owner not in owners)
        lineage = {path: who for path, who in self.lineage.items() if not set(who) & set(owners)}
        return self.model_copy(update={"experts": experts, "lineage": lineage})

    def to_bytes(self) -> bytes:
        """Return the file's bytes: indented JSON with a fixed order of keys."""
        return (self.model_dump_json(indent=2) + "\n").encode()

    @property
    def membership_digest(self) -> str:
        """SHA-256 over what decides the logits: base, recipe, router, public artefacts and experts."""
        parts = [
            self.base.fingerprint,
            self.base.routing_sha256 or "",
            self.recipe,
            self.router.model_dump_json(),
            *(expert.digest for expert in self.experts),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the lock of a composed folder.

        Raises:
            BuildError: There is none, or it is not well formed.
        """
        path = folder / LOCK_NAME
        if not path.is_file():
            raise BuildError(
                f"{folder} is not a composed folder: it has no {LOCK_NAME}. Make one with `coterie build`."
            )
        data = load_json(path, what=str(path), max_bytes=MAX_LOCK_BYTES, error=BuildError)
        return validate(cls, data, what=str(path), error=BuildError)
