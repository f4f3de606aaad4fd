"""The manifest inside a composed folder: read as the build wrote it, and as it will be when owners come or leave.

Knows names, prompts and settings; knows nothing of files beside the manifest's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from composer.edit_members import Joining
from composer.lock import Lock
from composer.manifest import ExpertEntry, Manifest
from experts.errors import BuildError
from experts.names import parse_reference
from experts.strict import load_yaml

__all__ = ["MANIFEST_NAME", "changed_manifest", "read_manifest"]

MANIFEST_NAME = "manifest.yaml"


def read_manifest(folder: Path, lock: Lock) -> Manifest:
    """Return what a composed folder was made from.

    Raises:
        ManifestError: There is none, or it is not well formed.
        BuildError: It was changed after the build.
    """
    path = folder / MANIFEST_NAME
    manifest = Manifest.from_file(path)
    # of the file's own keys, since a later version of the format may have more of them
    keys = json.dumps(load_yaml(path, what=str(path)), sort_keys=True, separators=(",", ":"))
    if hashlib.sha256(keys.encode()).hexdigest() != lock.manifest_sha256:
        raise BuildError(
            f"{path} was changed after the build, so it does not say what the folder is. Build a new folder from it: "
            "coterie build."
        )
    return manifest


def changed_manifest(
    manifest: Manifest, staying: Collection[str], new: Joining, prompts: Sequence[str] = ()
) -> Manifest:
    """Return the manifest with its experts by name: the order must not depend on the way that led to it.

    Args:
        manifest: What it was. Who neither stays nor stands under its ``opt_out`` is not mentioned any more.
        staying: Names of the experts that stay.
        new: Who joins.
        prompts: See `add_experts`.
    """
    entries = {parse_reference(entry.ref)[0]: entry for entry in manifest.experts}
    listed = set(entries)
    entries = {
        name: entry
        for name, entry in entries.items()
        if name in staying or name.partition("/")[0] in manifest.opt_out
    }
    for name, (reference, _) in new.items():
        entry = entries.get(name)
        entry = ExpertEntry(ref=reference) if entry is None else entry.model_copy(update={"ref": reference})
        entries[name] = entry.model_copy(update={"positive_prompts": tuple(prompts)}) if prompts else entry
    upcycle = manifest.upcycle and manifest.upcycle.without(listed - set(entries))
    experts = tuple(entry for _, entry in sorted(entries.items()))
    return manifest.model_copy(update={"experts": experts, "upcycle": upcycle})
