"""Composes a folder again from its own files, with other owners: what opting out is compared with."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from composer.building import build
from composer.lock import LockedExpert
from composer.manifest import ExpertEntry, Manifest
from composer.planning import plan
from composer.source import FolderSource

__all__ = ["recompose"]


def recompose(
    folder: Path,
    out: Path,
    *,
    without: Collection[str] = (),
    opt_out: Collection[str] = (),
    only: Collection[str] | None = None,
) -> Path:
    """Plan and build anew.

    Args:
        folder: A composed folder, the source of every file.
        out: The new folder.
        without: Owners whom the new manifest does not mention.
        opt_out: Owners whom the new manifest lists and opts out.
        only: Names of the experts that the new manifest mentions; None: all.

    Returns:
        ``out``. Where nobody is left, the base stands in it alone, with an empty composition.
    """
    source = FolderSource(folder)
    kept = [
        e for e in source.lock.experts if e.whose.isdisjoint(without) and (only is None or e.name in only)
    ]
    if not any(e.whose.isdisjoint(opt_out) for e in kept):
        return _base_alone(source, out)
    gone = {e.name for e in source.lock.experts} - {e.name for e in kept}
    manifest = Manifest.of_recipe(source.lock.recipe)(
        name=source.lock.name,
        recipe=source.lock.recipe,
        base=source.lock.base.name,
        experts=tuple(_entry(e) for e in kept),
        opt_out=tuple(sorted(opt_out)),
        router=source.lock.router,
        upcycle=source.lock.upcycle and source.lock.upcycle.without(gone),
        dtype=source.lock.dtype,  # type: ignore[arg-type]
    )
    return build(plan(manifest, source, changed=True), out, registry=source)


def _entry(expert: LockedExpert) -> ExpertEntry:
    return ExpertEntry(
        ref=f"{expert.name}@sha256:{expert.digest}",
        positive_prompts=expert.positive_prompts,
        negative_prompts=expert.negative_prompts,
    )


def _base_alone(source: FolderSource, out: Path) -> Path:
    """Write the composition of nobody: a composed folder whose lock lists no expert."""
    import shutil

    from composer.building import link_file, new_folder
    from composer.lock import LOCK_NAME, TUNED_FOLDER

    with new_folder(out) as staging:
        for path in sorted(source.folder.rglob("*")):
            name = path.relative_to(source.folder)
            if path.is_file() and name.parts[0] not in ("experts", TUNED_FOLDER) and name.name != LOCK_NAME:
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                if name.name in ("config.json", "README.md"):
                    shutil.copyfile(path, staging / name)
                else:
                    link_file(path, staging / name)
        lock = source.lock.without(source.lock.composed_owners)
        (staging / LOCK_NAME).write_bytes(lock.to_bytes())
    return out
