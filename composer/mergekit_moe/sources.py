"""The models that a manifest names: where their tensors lie, and the adapter that is to be added to them.

Knows folders, the hub's cache and PEFT's files; reads headers, and weights only when asked for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from composer.export.tensors import FLOATS, Slice
from composer.mergekit_moe.manifest import ModelPath, ModelRef
from experts.base import BaseDescription
from experts.errors import AdmissionError, AssetError, CoterieError, ManifestError
from experts.fingerprint import checkpoint_files, tokenizer_files, tokenizer_fingerprint
from experts.kinds import get_kind
from experts.kinds.lora import LoraSpec, lora_spec, lora_tensor_names
from experts.names import unknown_name
from experts.pickles import conversion
from experts.safetensors_header import read_header

__all__ = ["Adapter", "SourceModel", "Sources", "Update"]

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


class Update(NamedTuple):
    """What an adapter adds to a weight: ``scaling * B A``."""

    a: Slice
    """``(r, in)``"""
    b: Slice
    """``(out, r)``"""
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A PEFT LoRA folder on its model."""

    spec: LoraSpec
    tensors: Mapping[str, Slice]

    def update(self, module: str) -> Update | None:
        """Return what is added to a module's weight."""
        if module not in self.spec.modules:
            return None
        a, b = lora_tensor_names(module)
        return Update(a=self.tensors[a], b=self.tensors[b], scaling=self.spec.modules[module].scaling)


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """One model of a manifest.

    Attributes:
        ref: As the manifest names it.
        folder: Where its files are.
        description: What its headers say.
        tensors: By name.
        adapter: What is added to it.
    """

    ref: ModelRef
    folder: Path
    description: BaseDescription
    tensors: Mapping[str, Slice]
    adapter: Adapter | None

    @classmethod
    def open(cls, ref: ModelRef, *, near: Path) -> SourceModel:
        """Read the headers.

        Args:
            ref: The model.
            near: Where a relative path is looked for if the working folder has it not.

        Raises:
            CoterieError: The model is missing, incomplete, pickled, or of no known layout.
        """
        folder = find_folder(ref.model, near=near)
        _refuse_pickles(folder)
        try:
            description = BaseDescription.from_headers(folder)
            tensors = {
                name: Slice.of(path, tensor)
                for path, held in checkpoint_files(folder).items()
                for name, tensor in held.items()
            }
        except CoterieError as error:
            raise AdmissionError(f"{ref.model}: {error}") from None
        odd = sorted({found.dtype for found in tensors.values()} - set(FLOATS) - {"BOOL", "I64", "I32", "U8"})
        if odd:
            raise AdmissionError(f"{ref.model} holds tensors of dtype {', '.join(odd)}; save it unquantised.")
        adapter = None if ref.lora is None else _open_adapter(ref.lora, description, near=near)
        return cls(ref=ref, folder=folder, description=description, tensors=tensors, adapter=adapter)

    def update(self, name: str) -> Update | None:
        """Return what the adapter adds to a tensor."""
        return None if self.adapter is None else self.adapter.update(name.removesuffix(".weight"))

    @property
    def family(self) -> str:
        """The configuration's ``model_type``."""
        return str(self.description.config.get("model_type"))

    @property
    def vocabulary(self) -> int | None:
        """Rows of the input embedding."""
        found = next((t for n, t in self.tensors.items() if n.endswith("embed_tokens.weight")), None)
        return None if found is None else found.shape[0]

    @cached_property
    def tokenizer(self) -> str | None:
        """Fingerprint of the tokenizer; None where there is none."""
        return tokenizer_fingerprint(self.folder) if tokenizer_files(self.folder) else None


def _open_adapter(path: ModelPath, base: BaseDescription, *, near: Path) -> Adapter:
    kind = get_kind("lora")
    folder = find_folder(path, near=near)
    if not kind.detect(folder):
        raise AdmissionError(
            f"{path} is no adapter: it needs {kind.config_file} and {kind.weights_file}"
            + (", and pickles are never read." if (folder / "adapter_model.bin").exists() else ".")
        )
    config = kind.read_config(folder / kind.config_file)
    weights = folder / kind.weights_file
    try:
        spec = lora_spec(config, base)
        tensors = {name: Slice.of(weights, found) for name, found in read_header(weights).tensors.items()}
        expected = kind.resolve(config, base).shapes
    except CoterieError as error:
        raise AdmissionError(f"{path}: {error}") from None
    if {name: found.shape for name, found in tensors.items()} != dict(expected):
        raise AdmissionError(
            f"{path}: {kind.weights_file} does not hold exactly what {kind.config_file} says."
        )
    return Adapter(spec=spec, tensors=tensors)


def _refuse_pickles(folder: Path) -> None:
    pickle = conversion(folder)
    if pickle and not get_kind("dense").detect(folder):
        raise AdmissionError(f"'{folder}' holds no safetensors: {pickle}")


def find_folder(path: ModelPath, *, near: Path) -> Path:
    """Return the folder of a model: a path, or what the hub's cache has or downloads.

    Raises:
        ManifestError: There is no such folder, and the name is not one of the hub's.
        UnknownNameError: The hub does not have it, and there is a folder that it would be in.
        AssetError: The hub could not be reached or does not have it.
    """
    for candidate in (Path(path.path), near / path.path):
        if candidate.is_dir():
            return candidate
    owner, slash, name = path.path.partition("/")
    if path.path.startswith((".", "/", "~")) or not slash or not owner or not name or "/" in name:
        raise ManifestError(f"There is no folder '{path.path}', and it is no name of a model on the hub.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        found = snapshot_download(path.path, revision=path.revision, allow_patterns=_PATTERNS)
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        beside = {f"{owner}/{p.name}" for place in (Path(owner), near / owner) for p in _folders(place)}
        if beside:  # a misspelt path looks like a name on the hub
            raise unknown_name("model folder", path.path, beside) from None
        reason = str(error).strip().splitlines()[0]
        raise AssetError(f"'{path}' is no folder, and the hub did not give it: {reason}") from None
    return Path(found)


def _folders(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.is_dir()] if place.is_dir() else []


class Sources:
    """Opens every model of a manifest once."""

    def __init__(self, *, near: Path) -> None:
        self._near = near
        self._open: dict[ModelRef, SourceModel] = {}

    def __call__(self, ref: ModelRef) -> SourceModel:
        """Return the model; see `SourceModel.open`."""
        if ref not in self._open:
            self._open[ref] = SourceModel.open(ref, near=self._near)
        return self._open[ref]

    def __iter__(self) -> Iterator[SourceModel]:
        return iter(self._open.values())
