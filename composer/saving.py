"""Writes a loaded composed model back as a composed folder, without the owners that were left out.

A composition's weights are its owners' published files, so saving links those files; a model whose weights were
changed after loading has no such files and is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from composer.building import link_file, new_folder
from composer.edit_manifest import MANIFEST_NAME, changed_manifest, read_manifest
from composer.lock import LOCK_NAME, TUNED_FOLDER, Lock
from composer.manifest import Manifest
from composer.model_card import write_model_card
from experts.card import CARD_FILE
from experts.errors import BuildError

if TYPE_CHECKING:
    from composer.model import ComposedForCausalLM

__all__ = ["save"]


def save(model: ComposedForCausalLM, out: Path | str) -> Path:
    """Write ``out``, which must not exist; see `ComposedForCausalLM.save_pretrained`."""
    source = model.membership.folder
    if source is None:
        raise BuildError(
            "This model was not loaded from a composed folder, so there are no published files to save. Use "
            "`coterie build`."
        )
    folder = Path(source)
    _check_unchanged(model, folder)
    lock = Lock.read(folder)
    absent = set(lock.composed_owners) - _present(model, lock)
    kept = (lock.untuned if model.untuned is None else lock).without(absent)
    manifest, rewritten = _manifest(folder, lock, kept)
    if rewritten:
        kept = kept.model_copy(update={"manifest_sha256": manifest.digest})
    with new_folder(Path(out)) as staging:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and _belongs(name, kept) and not (rewritten and name == MANIFEST_NAME):
                target = staging / name
                target.parent.mkdir(parents=True, exist_ok=True)
                link_file(path, target)
        (staging / LOCK_NAME).write_bytes(kept.to_bytes())
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["composition"] = kept.membership_digest
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if rewritten and kept.experts:  # no manifest says that there is nobody
            text = yaml.safe_dump(manifest.to_dict(), sort_keys=False, allow_unicode=True)
            (staging / MANIFEST_NAME).write_text(text, encoding="utf-8")
        write_model_card(staging / "README.md", kept, description=manifest.description)
    return Path(out)


def _manifest(folder: Path, lock: Lock, kept: Lock) -> tuple[Manifest, bool]:
    """Return the manifest of what is saved, and whether it is another one.

    As after `coterie remove`, who is not in the folder is not mentioned: neither their names nor their prompts.
    """
    manifest = read_manifest(folder, lock)
    staying = {expert.name for expert in kept.experts}
    changed = changed_manifest(manifest, staying, {})
    return (manifest, False) if len(changed.experts) == len(manifest.experts) else (changed, True)


def _present(model: ComposedForCausalLM, lock: Lock) -> set[str]:
    """Return everybody of whom an expert of the model holds something."""
    names = {name.partition("#")[0] for name in model.membership.experts}  # copies have numbers
    return {owner for expert in lock.experts if expert.name in names for owner in expert.whose}


def _belongs(name: str, lock: Lock) -> bool:
    if name in (LOCK_NAME, "README.md", "config.json"):
        return False  # written anew
    if name.startswith(f"{TUNED_FOLDER}/"):
        return name in lock.lineage
    if not name.startswith("experts/"):
        return True
    return name in lock.lineage or name in {f"{e.folder}/{CARD_FILE}" for e in lock.experts}


def _check_unchanged(model: ComposedForCausalLM, folder: Path) -> None:
    """Compare every parameter with a fresh load of the same owners.

    Raises:
        BuildError: One of them differs.
    """
    from composer.loading import load

    # an owner of text alone is among the known ones; while tuned weights count, nobody is absent
    present = _present(model, Lock.read(folder))
    absent = set() if model.untuned is not None else model.membership.known_owners - present
    fresh: Any = load(folder, opt_out=absent, dtype=model.dtype)
    theirs = dict(fresh.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in theirs or not torch.equal(parameter.detach().cpu(), theirs[name]):
            raise BuildError(
                f"'{name}' was changed after loading, so it is no owner's published weight and its lineage is not "
                "known. Publish the change as an expert, or save a state dict yourself."
            )
