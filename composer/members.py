"""The experts of a composed folder, opened for loading: their cards, files and routing artefacts.

Knows where files are and what is in them; knows nothing of layers or routers. A left-out owner's files are never
opened.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.lock import TUNED_FOLDER, Lock, LockedExpert
from experts.base import BaseDescription
from experts.card import CARD_FILE, ExpertCard, FileEntry
from experts.errors import BuildError, IntegrityError
from experts.files import sha256_file
from experts.routing_artifacts import RoutingArtifacts
from experts.routing_origin import load_public

if TYPE_CHECKING:
    import torch

__all__ = ["BASE_FOLDER", "DESCRIPTION_NAME", "PUBLIC_FOLDER", "Member", "Members"]

BASE_FOLDER = "base"
PUBLIC_FOLDER = "public"
DESCRIPTION_NAME = "base.json"


@dataclass(frozen=True)
class Member:
    """One expert of the composition.

    Attributes:
        id: Position in the loaded model, from 1.
        locked: What the lock says of it.
        folder: Where its files are.
    """

    id: int
    locked: LockedExpert
    folder: Path

    @cached_property
    def card(self) -> ExpertCard:
        """The expert's card, checked against the lock's digest."""
        card = ExpertCard.from_bytes(self.file(CARD_FILE).read_bytes())
        if card.digest != self.locked.digest:
            raise IntegrityError(
                f"The card of {self.locked.name} in {self.folder} has digest {card.digest}, the composition says "
                f"{self.locked.digest}. Build the folder again."
            )
        return card

    def file(self, name: str) -> Path:
        """Return the path of one of the expert's files.

        Raises:
            BuildError: The file is missing or has another size than the lock says.
        """
        path = self.folder / name
        size = next((entry.size for entry in self.locked.files if entry.path == name), None)
        if not path.is_file() or (size is not None and path.stat().st_size != size):
            raise BuildError(
                f"{path} is missing or has been changed (expected {size} bytes). Build the folder again."
            )
        return path

    def routing(self, hidden_size: int) -> RoutingArtifacts:
        """Read the expert's routing artefacts, checked against its card."""
        info = self.card.routing
        if info is None:
            raise BuildError(f"{self.locked.name} publishes no routing artefacts.")
        return RoutingArtifacts.load(self.file(info.file), info, hidden_size=hidden_size)

    @contextmanager
    def tensors(self, name: str) -> Iterator[Mapping[str, torch.Tensor]]:
        """Map a safetensors file; tensors are read as they are asked for."""
        from safetensors import safe_open

        with safe_open(self.file(name), framework="pt") as file:
            yield _Lazy(file)


class _Lazy(Mapping[str, Any]):
    """A mapping view of an open safetensors file."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._names = tuple(file.keys())

    def __getitem__(self, name: str) -> Any:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Members:
    """The experts that are loaded.

    Attributes:
        folder: The composed folder.
        lock: The lock without the owners that are left out.
    """

    folder: Path
    lock: Lock

    @classmethod
    def open(cls, folder: Path, lock: Lock, *, without: Collection[str]) -> Members:
        """Open a composed folder without some owners."""
        return cls(folder=folder, lock=lock.without(without))

    @cached_property
    def experts(self) -> tuple[Member, ...]:
        """The loaded experts in canonical order."""
        return tuple(
            Member(id=position, locked=locked, folder=self.folder / locked.folder)
            for position, locked in enumerate(self.lock.experts, start=1)
        )

    @cached_property
    def description(self) -> BaseDescription:
        """The anchor's tensors and layout."""
        path = self.folder / DESCRIPTION_NAME
        if not path.is_file():
            raise BuildError(f"{path} is missing. Build the folder again.")
        return BaseDescription.from_json(path.read_bytes())

    def check_digests(self) -> None:
        """Hash every file of the loaded experts, and tuned files where they count.

        Raises:
            IntegrityError: Bytes differ from what the lock says.
        """
        files = [(member.file(entry.path), entry) for member in self.experts for entry in member.locked.files]
        if self.lock.tuned is not None:
            files += [(self.folder / TUNED_FOLDER / entry.path, entry) for entry in self.lock.tuned.all_files]
        _check_digests(files)

    def check_published(self) -> None:
        """Hash what the owners of the loaded experts publish for routing; it is small.

        Raises:
            IntegrityError: Bytes differ from what the lock says.
        """
        _check_digests(
            (member.file(entry.path), entry)
            for member in self.experts
            for entry in member.locked.files
            if member.card.routing is not None and entry.path == member.card.routing.file
        )

    def public(self) -> RoutingArtifacts:
        """Read the anchor's routing artefacts, which nobody owns."""
        info = self.lock.base.routing
        if info is None:
            raise BuildError("The base publishes no routing artefacts.")
        path = self.folder / PUBLIC_FOLDER / info.file
        return load_public(path, info, hidden_size=self.description.hidden_size)


def _check_digests(files: Iterable[tuple[Path, FileEntry]]) -> None:
    for path, entry in files:
        found = sha256_file(path)
        if found != entry.sha256:
            raise IntegrityError(
                f"{path} has sha256 {found}, the composition says {entry.sha256}. Build the folder again."
            )
