"""The public anchor as a training job sees it: a folder transformers can load, its description, its public rows.

Knows how to find one by path or in a registry and how to load it frozen; knows nothing of experts.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experts.base import BaseDescription
from experts.card import BaseRef
from experts.errors import ManifestError
from experts.fingerprint import tokenizer_fingerprint
from experts.names import unknown_name
from experts.routing_artifacts import RoutingArtifacts, RoutingInfo
from experts.routing_origin import load_public
from pipelines.devices import has_bfloat16, is_gpu

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipelines.train.job import DomainJob
    from registry import Registry

__all__ = ["ResolvedBase", "compute_dtype", "load_anchor", "resolve_base", "statistics_layer"]

_FLOAT32_LIMIT = 4 << 30
"""Bytes of a float32 anchor beyond which memory matters more than speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedBase:
    """A public anchor that is at hand.

    Attributes:
        folder: A checkpoint folder with its tokenizer.
        ref: What an expert's card says about it.
        description: Tensors, layers and FFN linears.
        routing_file: The public routing artefact's file, if there is one.
        routing_info: What that file holds.
    """

    folder: Path
    ref: BaseRef
    description: BaseDescription
    routing_file: Path | None = None
    routing_info: RoutingInfo | None = None

    def routing(self) -> RoutingArtifacts | None:
        """Read the public routing artefact, if there is one."""
        if self.routing_file is None or self.routing_info is None:
            return None
        return load_public(self.routing_file, self.routing_info, hidden_size=self.description.hidden_size)

    def to_json(self) -> str:
        """For another process on the same machine; nothing is hashed again there."""
        return json.dumps(
            {
                "folder": str(self.folder),
                "ref": self.ref.model_dump(mode="json"),
                "description": self.description.to_json(),
                "routing_file": str(self.routing_file) if self.routing_file else None,
                "routing_info": self.routing_info.model_dump(mode="json") if self.routing_info else None,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> ResolvedBase:
        """The reverse of `to_json`."""
        body = json.loads(text)
        info = body["routing_info"]
        return cls(
            folder=Path(body["folder"]),
            ref=BaseRef.model_validate_json(json.dumps(body["ref"])),
            description=BaseDescription.from_json(body["description"]),
            routing_file=Path(body["routing_file"]) if body["routing_file"] else None,
            routing_info=RoutingInfo.model_validate_json(json.dumps(info)) if info else None,
        )


@contextmanager
def resolve_base(base: str | Path, *, registry: Registry | None = None) -> Iterator[ResolvedBase]:
    """Find an anchor and keep it at hand while the block runs.

    A registry's base is linked into a temporary folder, since its files lie under their digests.

    Args:
        base: The path of a checkpoint folder, or a base's name in ``registry``.
        registry: Where names are looked up. A folder whose fingerprint it knows gets the name it has there.

    Raises:
        ManifestError: There is no such folder, or a name is given without a registry.
        UnknownNameError: The registry does not know the name.
    """
    if isinstance(base, Path) or "/" in base or base.startswith("."):
        yield _from_folder(Path(base), registry=registry)
        return
    if registry is None:
        raise ManifestError(
            f"base '{base}' is a name and no registry is given. Name a registry, or the path of a checkpoint folder."
        )
    scratch = Path(tempfile.mkdtemp(prefix="coterie-base-"))
    try:
        yield _from_registry(base, registry=registry, scratch=scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _from_folder(folder: Path, *, registry: Registry | None) -> ResolvedBase:
    if not (folder / "config.json").is_file():
        raise ManifestError(f"base '{folder}' is not a checkpoint folder: there is no config.json in it.")
    description = BaseDescription.from_folder(folder)
    tokenizer = tokenizer_fingerprint(folder)
    known = (
        [
            record
            for record in registry.bases()
            if record.fingerprint == description.fingerprint
            and record.description.embedding == description.embedding
        ]
        if registry
        else []
    )
    ref = BaseRef(
        name=known[0].name if known else folder.resolve().name,
        fingerprint=description.fingerprint,
        tokenizer_fingerprint=tokenizer,
        embedding=description.embedding,
    )
    if registry is None or not known:
        return ResolvedBase(folder=folder, ref=ref, description=description)
    digest = known[0].routing_sha256
    return ResolvedBase(
        folder=folder,
        ref=ref,
        description=description,
        routing_file=registry.blob_path(digest).absolute() if digest else None,
        routing_info=known[0].routing,
    )


def _from_registry(name: str, *, registry: Registry, scratch: Path) -> ResolvedBase:
    names = [record.name for record in registry.bases()]
    if name not in names:
        raise unknown_name("base", name, names, advice="Add one with `coterie base add PATH --name NAME`.")
    record = registry.base(name)
    for entry in record.files:
        target = scratch / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        # a registry may be named by a relative path, which a link would read from its own folder
        target.symlink_to(registry.blob_path(entry.sha256).absolute())
    return ResolvedBase(
        folder=scratch,
        ref=record.ref,
        description=record.description,
        routing_file=registry.blob_path(record.routing_sha256).absolute() if record.routing_sha256 else None,
        routing_info=record.routing,
    )


def load_anchor(
    base: ResolvedBase, *, dtype: str | None, device: torch.device | str = "cpu"
) -> tuple[nn.Module, Any]:
    """Load model and tokenizer, frozen, in eval mode.

    Args:
        base: The anchor.
        dtype: ``float32`` or ``bfloat16``; None takes what `compute_dtype` says.
        device: Where the model goes.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    chosen: torch.dtype = getattr(torch, dtype or compute_dtype(base.description, torch.device(device)))
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=chosen, local_files_only=True)
    model.requires_grad_(False)
    model.eval()
    model.to(device)
    return model, AutoTokenizer.from_pretrained(base.folder, local_files_only=True)


def statistics_layer(job: DomainJob, base: ResolvedBase) -> int:
    """Return the layer whose incoming states a job's statistics are of.

    The first trained one; for a whole model, of which every layer is trained, where the base's public statistics are,
    or else the middle, where adapters of the upper half have theirs.
    """
    num_layers = base.description.num_layers
    if job.kind != "dense":
        return job.layer_numbers(num_layers)[0]
    public = base.routing_info.statistics if base.routing_info else None
    return public.layer if public else num_layers // 2


def compute_dtype(description: BaseDescription, device: torch.device | None = None) -> str:
    """What to compute in: ``bfloat16`` if the anchor has it and it is fast here or too big otherwise, or ``float32``.

    A GPU that has bfloat16 is fast with it. On a CPU without matrix units (AMX), bfloat16 products take 1.7 times as
    long as float32 ones [measured], and a bfloat16 anchor is represented exactly in float32.

    Args:
        description: The anchor.
        device: Where; None: a CPU.
    """
    if description.dtype != "BF16":
        return "float32"
    if device is not None and is_gpu(device):
        return "bfloat16" if has_bfloat16(device) else "float32"
    parameters = sum(math.prod(spec.shape) for spec in description.tensors.values())
    return "bfloat16" if _has_matrix_units() or 4 * parameters > _FLOAT32_LIMIT else "float32"


def _has_matrix_units() -> bool:
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
