"""An expert as a dense model: the anchor's weights with what the expert changes, tensor by tensor.

Knows the kinds' files; a tensor is computed when it is asked for, so that no more than one is in memory beside
those the caller keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from safetensors import safe_open
from torch import Tensor

from experts.errors import AdmissionError, PlanError
from experts.kinds import get_kind
from experts.kinds.lora import LoraSpec, lora_spec, lora_tensor_names
from experts.safetensors_header import MAX_BASE_HEADER, StoredTensor, read_header
from pipelines.baselines.arm import DenseArm

if TYPE_CHECKING:
    from experts.base import BaseDescription
    from pipelines.baselines.context import BaselineContext, Member

__all__ = ["DenseTensors", "make_anchor", "make_single", "open_dense", "write_dense"]

Weight = Callable[[str], Tensor]
"""Gives a weight of the anchor by its name in the checkpoint."""


@final
class DenseTensors(Mapping[str, Tensor]):
    """The weights in which an expert's dense model differs from the anchor, by their names in the checkpoint.

    A low-rank expert's are ``W + scaling * B A``, summed in float32 and rounded to W's dtype once; a full expert's
    are its own. Each is computed anew when it is asked for, in the dtype and on the device of the anchor's.

    Args:
        member: The expert.
        base: The anchor's tensors and layout.
        weight: Gives the anchor's weights.

    Raises:
        PlanError: The expert's kind is not one that can be merged into a dense model.
        AdmissionError: The weights file is not what the configuration says.
    """

    def __init__(self, member: Member, base: BaseDescription, *, weight: Weight) -> None:
        kind = get_kind(member.card.kind)
        config = kind.read_config(member.files[kind.config_file])
        self._weight = weight
        self._file = _mapped(member.files[kind.weights_file])
        found, expected = set(self._file.keys()), set(kind.resolve(config, base).shapes)
        if found != expected:
            raise AdmissionError(
                f"The weights of {member.record.ref} are not what its configuration says: extra "
                f"{sorted(found - expected)[:5]}, missing {sorted(expected - found)[:5]}. Register it again."
            )
        self._lora: LoraSpec | None = None
        if kind.name == "lora":
            self._lora = lora_spec(config, base)
            self._names = tuple(f"{module}.weight" for module in self._lora.modules)
        elif kind.name == "ffn":
            self._names = tuple(sorted(expected))
        else:
            raise PlanError(
                f"{member.record.ref} is of kind '{kind.name}', which has no dense form. Dense baselines take "
                "experts of the kinds 'ffn' and 'lora'."
            )

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        own = self._weight(name)
        if self._lora is None:
            changed: Tensor = self._file.get_tensor(name)
            return changed.to(own.device, own.dtype)
        module = name.removesuffix(".weight")
        a, b = (self._file.get_tensor(key).to(own.device).float() for key in lora_tensor_names(module))
        with torch.no_grad():
            delta: Tensor = b @ a
            return (own.float() + self._lora.modules[module].scaling * delta).to(own.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _mapped(path: Path) -> Any:
    """Map a safetensors file; nothing is read yet, and the mapping lasts as long as the object."""
    return safe_open(path, framework="pt")


def open_dense(context: BaselineContext) -> dict[str, DenseTensors]:
    """Open every expert of a context on its anchor; by domain, sorted. Errors: `BaselineContext.members`."""
    anchor = context.anchor()
    return {
        domain: DenseTensors(member, anchor.description, weight=anchor.weight)
        for domain, member in context.members().items()
    }


def make_anchor(context: BaselineContext) -> DenseArm:
    """Make the anchor's own arm: nobody's expert."""
    return DenseArm(context.anchor(), {})


def make_single(context: BaselineContext, *, domain: str) -> DenseArm:
    """Make the arm of one expert alone, on every text.

    Raises:
        UnknownNameError: There is no expert for ``domain``.
    """
    context.check_domain(domain)
    alone = context.without(*(other for other in context.domains if other != domain))
    return DenseArm(context.anchor(), dict(open_dense(alone)[domain]))


def write_dense(context: BaselineContext, domain: str, out: Path | str) -> Path:
    """Write one expert as a dense checkpoint folder, which any tool reads.

    The anchor's files are copied, and the bytes of the changed tensors overwritten, one tensor at a time; dtypes
    are the anchor's. The folder appears whole or not at all.

    Args:
        context: Anchor and experts; its ``dtype`` and ``device`` do not matter here.
        domain: Whose expert.
        out: The folder; it must not exist.

    Raises:
        UnknownNameError: There is no expert for ``domain``.
        BuildError: ``out`` exists, or cannot be written.
    """
    from composer.building import link_file, new_folder

    context.check_domain(domain)
    record = context.registry.base(context.base)
    member = context.without(*(other for other in context.domains if other != domain)).members()[domain]
    with new_folder(Path(out)) as staging:
        for entry in record.files:
            path = staging / entry.path
            path.parent.mkdir(parents=True, exist_ok=True)
            link_file(context.registry.blob_path(entry.sha256), path, copy=True)
        places = _places(staging, record.description)
        # read from the registry's own copy: the staged one is being overwritten
        blobs = {entry.path: context.registry.blob_path(entry.sha256) for entry in record.files}

        def weight(name: str) -> Tensor:
            path, _ = places[name]
            tensor: Tensor = _mapped(blobs[path]).get_tensor(name)
            return tensor

        for name, tensor in DenseTensors(member, record.description, weight=weight).items():
            _overwrite(staging, *places[name], tensor)
    return Path(out)


def _places(folder: Path, base: BaseDescription) -> dict[str, tuple[str, StoredTensor]]:
    """Where in the checkpoint each tensor is: its file and its bytes."""
    places: dict[str, tuple[str, StoredTensor]] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        header = read_header(path, max_header=MAX_BASE_HEADER, max_tensors=1 << 20)
        relative = path.relative_to(folder).as_posix()
        places |= {name: (relative, stored) for name, stored in header.tensors.items()}
    return {name: places[name] for name in base.tensors}


def _overwrite(folder: Path, path: str, stored: StoredTensor, tensor: Tensor) -> None:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert len(data) == stored.end - stored.start, "the anchor's own dtype and shape"
    with (folder / path).open("r+b") as file:
        file.seek(stored.start)
        file.write(data)
