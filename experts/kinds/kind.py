"""What every kind of expert answers: its files, its configuration, the exact tensors it may hold.

Knows the questions; each kind's own file knows the answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experts.base import BaseDescription, TensorSpec
from experts.card import BaseRef
from experts.errors import AdmissionError
from experts.files import copy_file, read_bounded
from experts.strict import load_json

__all__ = ["DTYPES", "ExpertKind", "ResolvedConfig"]

DTYPES = ("F32", "BF16", "F16")
"""Dtypes an expert's weights may have, one for all tensors of an expert."""
MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """What a configuration means on a base."""

    shapes: Mapping[str, tuple[int, ...]]
    """Name and shape of every tensor that the weights file must hold, no more and no less."""
    layers: tuple[int, ...]
    """Layers that the expert changes, ascending."""
    rank: int | None
    """Largest rank of a low-rank expert."""
    ffn_only: bool
    """Whether nothing but feed-forward linears is changed."""
    dtype: str | None
    """Dtype that the configuration declares, if it does."""
    base_name: str | None
    """Name of the base that the configuration gives, if it does."""


class ExpertKind(ABC):
    """One kind of expert: a configuration file and a safetensors file, and what they may say on a given base.

    Every method that takes a configuration and a base raises what `resolve` raises.
    """

    name: ClassVar[str]
    config_file: ClassVar[str]
    weights_file: ClassVar[str]
    left_behind: ClassVar[frozenset[str]] = frozenset()
    """Files that may lie beside this kind's own in a raw folder; they are never copied."""
    folders_left_behind: ClassVar[frozenset[str]] = frozenset()
    """Folders of the same sort."""
    more_files: ClassVar[tuple[str, ...]] = ()
    """Further files that every expert of this kind has."""
    links_allowed: ClassVar[bool] = False
    """Whether the files of a raw folder may be links, as in a download cache; a packed expert never holds one."""
    embeds: ClassVar[bool] = False
    """Whether experts of this kind are made for embedding models, not for language models."""

    @property
    def files(self) -> tuple[str, ...]:
        """The files that every expert of this kind has besides the card."""
        return tuple(sorted((self.config_file, self.weights_file, *self.more_files)))

    @property
    def forms(self) -> tuple[ExpertKind, ...]:
        """The forms that an expert of this kind takes, each with files of its own; all have the kind's name."""
        return (self,)

    def form(self, files: Collection[str]) -> ExpertKind:
        """Return the form that has these files.

        Args:
            files: Names of files, perhaps with others among them.

        Raises:
            AdmissionError: They are those of several forms.
        """
        return self

    def detect(self, folder: Path) -> bool:
        """Say whether the folder holds this kind's files (whatever is in them)."""
        return all((folder / name).exists() or (folder / name).is_symlink() for name in self.files)

    def raw_files(self, folder: Path) -> tuple[str, ...]:
        """Return the files of an expert that is not packed yet; `files` unless they take several forms.

        Raises:
            AdmissionError: The files contradict each other.
        """
        return self.files

    def hint(self, folder: Path) -> str | None:
        """Say why a folder that holds no known kind's files may be meant as this one, and what to do."""
        return None

    def check_base(self, base: BaseDescription) -> None:
        """Check that experts of this kind can be made for the base at all.

        Raises:
            AdmissionError: They cannot.
        """
        if self.embeds == (base.embedding is not None):
            return
        needed = "an embedding model (a sentence-transformers folder)" if self.embeds else "a language model"
        found = "a language model" if base.embedding is None else "an embedding model"
        raise AdmissionError(
            f"An expert of kind '{self.name}' is made for {needed}, and the base at hand is {found}. Use another "
            "base, or another kind of expert."
        )

    def check_raw(self, folder: Path, base: BaseDescription, base_ref: BaseRef) -> None:
        """Check what a raw folder holds beside the files that are packed.

        Raises:
            AdmissionError: It contradicts the base.
        """
        return

    def install_weights(self, folder: Path, target: Path, base: BaseDescription) -> list[str]:
        """Write the packed ``weights_file`` to ``target``, never holding it in memory; return remarks for the owner.

        Raises:
            AdmissionError: The weights cannot be packed.
        """
        copy_file(folder / self.weights_file, target)
        return []

    def install_more(self, folder: Path, target: Path) -> None:
        """Write `more_files` of the raw ``folder`` into the folder ``target``.

        Raises:
            AdmissionError: One of them cannot be packed.
        """
        return

    def check_more(self, files: Mapping[str, Path], base: BaseDescription, base_ref: BaseRef) -> None:
        """Check what `more_files` say.

        Args:
            files: Path in the card to the file.
            base: The anchor.
            base_ref: What the card says of the anchor.

        Raises:
            AdmissionError: Lists every offender.
        """
        return

    def read_config(self, path: Path) -> dict[str, object]:
        """Read the configuration file; the path may have any name.

        Raises:
            AdmissionError: Not a regular file, or not a JSON object.
        """
        data = read_bounded(path, max_bytes=MAX_CONFIG_BYTES, follow_symlinks=self.links_allowed)
        config = load_json(data, what=self.config_file, max_bytes=MAX_CONFIG_BYTES, error=AdmissionError)
        if not isinstance(config, dict):
            raise AdmissionError(f"{self.config_file} is not a JSON object.")
        return config

    @abstractmethod
    def resolve(self, config: Mapping[str, object], base: BaseDescription) -> ResolvedConfig:
        """Check every key of the configuration, alone and against the base, and say what it means.

        Raises:
            AdmissionError: Lists every offending key.
        """

    @abstractmethod
    def sanitize_config(self, config: Mapping[str, object], base_ref: BaseRef) -> dict[str, object]:
        """Return the configuration with the place of the base on the owner's machine replaced by its name."""

    def value_problems(
        self, config: Mapping[str, object], base: BaseDescription, norms: Mapping[str, float]
    ) -> list[str]:
        """Say what is absurd about the tensors' Frobenius norms taken together."""
        return []

    def check_config(self, config: Mapping[str, object], base: BaseDescription) -> None:
        """Do the checks of `resolve` only."""
        self.resolve(config, base)

    def expected_shapes(
        self, config: Mapping[str, object], base: BaseDescription
    ) -> Mapping[str, tuple[int, ...]]:
        """Return the name and shape of every tensor that the weights file must hold, no more and no less."""
        return self.resolve(config, base).shapes

    def expected_tensors(
        self, config: Mapping[str, object], base: BaseDescription, *, dtype: str = "F32"
    ) -> dict[str, TensorSpec]:
        """Return exactly the tensors that the configuration gives on the base, in the given dtype."""
        shapes = self.expected_shapes(config, base)
        return {name: TensorSpec(dtype=dtype, shape=shape) for name, shape in shapes.items()}

    def layers(self, config: Mapping[str, object], base: BaseDescription) -> tuple[int, ...]:
        """Return the layers that the expert changes, ascending."""
        return self.resolve(config, base).layers

    def ffn_only(self, config: Mapping[str, object], base: BaseDescription) -> bool:
        """Say whether the expert changes nothing but feed-forward linears."""
        return self.resolve(config, base).ffn_only
