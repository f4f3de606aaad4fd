"""Adds experts to a composed folder and takes experts out of it, without a registry holding the others.

The result is what a fresh build of the changed manifest gives, file for file, and takes the folder's place in one
step. Knows manifests, locks and links; opens no tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.building import Progress, build
from composer.edit_manifest import changed_manifest, read_manifest
from composer.edit_members import Joining, joining, leaving
from composer.edit_source import EditSource
from composer.lock import Lock, LockedTuning
from composer.members import BASE_FOLDER
from composer.planning import Plan, plan
from composer.source import FolderSource, Source
from composer.swap import replacing
from composer.upcycling.growth import NewRows, growth_problems, keep_tuning
from experts.card import CARD_FILE
from experts.errors import BuildError, CoterieError, PlanError
from experts.files import capped

__all__ = ["Change", "add_experts", "apply_change", "plan_change", "remove_experts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A composed folder as it will be.

    Attributes:
        folder: Which folder.
        before: What it is made of now.
        plan: What it will be made of.
        added: References (``owner/expert@version``) of the experts that join under a new name.
        replaced: Old to new reference of the experts of which another version takes the place.
        removed: References of the experts that leave.
        warnings: What the user should know, the plan's warnings included.
        source: Where names, cards and files come from.
        new_rows: What the new experts' router rows start from where tuned weights stay; None: they do not.
        trimmed: What stays tuned where only experts leave that joined after the tuning.
    """

    folder: Path
    before: Lock
    plan: Plan
    added: tuple[str, ...]
    replaced: Mapping[str, str]
    removed: tuple[str, ...]
    warnings: tuple[str, ...]
    source: EditSource
    new_rows: NewRows | None = None
    trimmed: LockedTuning | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for printing and ``--json``."""
        return {
            "folder": str(self.folder),
            "added": list(self.added),
            "replaced": dict(self.replaced),
            "removed": list(self.removed),
            **self.plan.to_dict(),
            "warnings": list(self.warnings),
        }


def add_experts(
    folder: Path | str,
    references: Sequence[str],
    *,
    registry: Source,
    copy: bool = False,
    prompts: Sequence[str] = (),
    new_rows: NewRows | None = None,
) -> Change:
    """Add experts to a composed folder; another version of an expert that is there takes its place.

    The result is the folder that `composer.building.build` makes of the folder's manifest with these references
    in it, its experts listed by name. Everything that stays is linked from the folder itself.

    Args:
        folder: A composed folder.
        references: ``owner/expert``, ``owner/expert@3`` or ``owner/expert@sha256:<card digest>``.
        registry: Where they are.
        copy: Whether the new files are copied instead of linked.
        prompts: Texts of the new experts' domain, where the router is made of prompts.
        new_rows: Keep what was tuned, and start the new experts' router rows from this; None: tuned weights are
            dropped, since a fresh build has none.

    Returns:
        What was changed.

    Raises:
        PlanError: Everything that stands in the way, at once.
        ConsentError: The owner of a new expert, or of one that is there, has opted out.
        BuildError: The folder is not a composed one, holds other files too, or cannot be written.
        IntegrityError: A file is missing. In every case the folder is as it was.
    """
    change = plan_change(folder, add=references, registry=registry, prompts=prompts, new_rows=new_rows)
    apply_change(change, copy=copy)
    return change


def remove_experts(folder: Path | str, names: Sequence[str]) -> Change:
    """Take experts out of a composed folder; needs no registry.

    The result is the folder that never had them, made of the same manifest without them, experts listed by name.

    Args:
        folder: A composed folder.
        names: Owners (all of whose experts leave, and whatever was tuned on their text) or experts, ``owner/expert``.

    Returns:
        What was changed.

    Raises:
        PlanError: A name that is not in the folder, or nobody would be left; everything at once.
        BuildError: See `add_experts`; in every case the folder is as it was.
    """
    change = plan_change(folder, remove=names)
    apply_change(change)
    return change


def plan_change(
    folder: Path | str,
    *,
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
    registry: Source | None = None,
    prompts: Sequence[str] = (),
    new_rows: NewRows | None = None,
) -> Change:
    """Say what adding and removing would give; nothing is written.

    Args:
        folder: A composed folder.
        add: References to experts of ``registry``.
        remove: Owners or experts in the folder.
        registry: Needed where ``add`` is not empty.
        prompts: See `add_experts`.
        new_rows: See `add_experts`.

    Raises:
        PlanError: Everything that stands in the way, at once.
        ConsentError: See `add_experts`.
        BuildError: ``folder`` is not a composed folder, or its manifest was changed.
    """
    path = Path(folder).resolve()
    own = FolderSource(path)
    manifest = read_manifest(path, own.lock)
    out = leaving(path, own.lock, remove)
    new = joining(path, own.lock, manifest, add, registry, without=out)
    kept = {expert.name: f"{expert.name}@{expert.version}" for expert in own.lock.experts}
    _check_members(path, kept, out, new)
    source = EditSource(own, registry if add else None, new)
    planned = plan(changed_manifest(manifest, set(kept) - out, new, prompts), source, changed=True)
    if new_rows is not None:
        problems = growth_problems(own.lock, new_rows, replaced=set(new) & set(kept), removed=out)
        if problems:
            raise PlanError(f"{path} cannot be changed:", problems=problems)
    gone = own.lock.leaving_owners(out) | {name for name in remove if "/" not in name}
    trimmed = own.lock.trimmed_tuning(out, owners=gone) if not new else None
    kept_tuning = new_rows is not None or trimmed is not None
    return Change(
        folder=path,
        before=own.lock,
        plan=planned,
        added=tuple(record.ref for name, (_, record) in sorted(new.items()) if name not in kept),
        replaced={kept[name]: record.ref for name, (_, record) in sorted(new.items()) if name in kept},
        removed=tuple(kept[name] for name in sorted(out)),
        warnings=(*planned.warnings, *_warnings(own, registry if add else None, kept=kept_tuning, gone=gone)),
        source=source,
        new_rows=new_rows,
        trimmed=trimmed,
    )


def apply_change(change: Change, *, copy: bool = False, progress: Progress | None = None) -> Path:
    """Make the changed folder beside the old one and let them change places.

    Args:
        change: From `plan_change`.
        copy: Whether the files of new experts are copied instead of linked.
        progress: Told of every file.

    Returns:
        The folder.

    Raises:
        BuildError: See `add_experts`.
    """
    with replacing(change.folder) as made:
        if Lock.read(change.folder) != change.before:
            raise BuildError(f"{change.folder} was changed meanwhile. Nothing was changed here; try again.")
        source = change.source
        if copy:
            source = source.copied_to(made.with_name(f"{made.name}.copies"))
        stays_tuned = change.new_rows is not None or change.trimmed is not None
        plain = made.with_name(f"{made.name}.plain") if stays_tuned else made
        build(change.plan, plain, registry=source, progress=progress)
        _check_nothing_lost(change, plain)
        if change.new_rows is not None:
            keep_tuning(change.folder, plain, made, new_rows=change.new_rows)
        elif change.trimmed is not None:
            from composer.tuned import write_grown

            write_grown(change.folder, plain, made, change.trimmed)
    return change.folder


def _check_members(folder: Path, there: Collection[str], out: Collection[str], new: Joining) -> None:
    both = sorted(set(out) & set(new))
    if both:
        raise PlanError(f"{folder} cannot be changed: {', '.join(both)} cannot both join and leave.")
    if not set(there) - set(out) and not new:
        raise PlanError(
            f"{folder} cannot be changed: without {', '.join(sorted(out))} no expert is left in it. Use its base "
            f"alone ({BASE_FOLDER}/ in it is an ordinary model folder), or delete the folder."
        )


def _warnings(own: FolderSource, registry: Source | None, *, kept: bool, gone: Collection[str]) -> list[str]:
    """Say that a tuning is lost, and where a fresh build would differ because something public is newer there."""
    if own.lock.tuned is not None and not kept:
        text = sorted(set(gone) & set(own.lock.tuned.text_owners))
        why = f" on text of {', '.join(text)} too" if text else ""
        tuned = f"The folder was tuned{why}; the changed one has the weights from before. Tune it again."
        return [tuned, *_newer(own, registry)]
    return _newer(own, registry)


def _newer(own: FolderSource, registry: Source | None) -> list[str]:
    if registry is None:
        return []
    base = own.lock.base
    try:
        newest = registry.base(base.name)
    except CoterieError:
        return []
    if newest.fingerprint != base.fingerprint or newest.routing_sha256 == base.routing_sha256:
        return []
    return [f"The registry has newer public routing artefacts for '{base.name}'; the folder keeps its own."]


def _check_nothing_lost(change: Change, made: Path) -> None:
    """Refuse to replace a folder that holds more than a build put there."""
    known = {f"{expert.folder}/{CARD_FILE}" for expert in change.before.experts} | set(change.before.lineage)
    found = (path.relative_to(change.folder) for path in change.folder.rglob("*") if not path.is_dir())
    foreign = [
        name.as_posix() for name in found if name.as_posix() not in known and not (made / name).exists()
    ]
    if foreign:
        raise BuildError(
            f"{change.folder} holds files that no build wrote; move them elsewhere first:",
            problems=capped(sorted(foreign)),
        )
