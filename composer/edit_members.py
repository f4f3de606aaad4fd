"""Who may join a composed folder and who is meant to leave it; every mistake is found before anything is written.

Knows names, versions and consent; knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from composer.lock import Lock, LockedExpert
from composer.manifest import Manifest
from composer.source import Source
from experts.errors import BuildError, ConsentError, CoterieError, PlanError
from experts.names import parse_reference, unknown_name
from registry.records import ExpertRecord

if TYPE_CHECKING:
    from registry.records import OptOut

__all__ = ["Joining", "joining", "leaving"]

Joining = Mapping[str, tuple[str, ExpertRecord]]
"""Name of a new expert -> the reference as it was given, the expert."""


def leaving(folder: Path, lock: Lock, given: Sequence[str]) -> frozenset[str]:
    """Return the names of the experts that owners and references stand for.

    Args:
        folder: The folder they leave.
        lock: What it is made of.
        given: Owners or references.

    Raises:
        PlanError: Names that are not in the folder, or nobody would be left; everything at once.
    """
    problems, found = [], set[str]()
    for item in given:
        try:
            found |= _matching(lock, item)
        except CoterieError as error:
            problems.append(str(error))
    if problems:
        raise PlanError(f"{folder} cannot be changed:", problems=problems)
    return frozenset(found)


def _matching(lock: Lock, item: str) -> set[str]:
    if "/" not in item:
        if item not in lock.involved:
            raise unknown_name("owner", item, lock.involved)
        return {expert.name for expert in lock.experts if item in expert.whose}
    name, label = parse_reference(item)
    there = {expert.name: expert for expert in lock.experts}
    if name not in there:
        raise unknown_name("expert", name, there)
    if label is not None and not _is_version(there[name], label):
        raise PlanError(f"{name} is there in version {there[name].version}, not {label}")
    return {name}


def _is_version(expert: LockedExpert, label: str) -> bool:
    if label.startswith("sha256:"):
        return label == f"sha256:{expert.digest}"
    return int(label) == expert.version


def joining(
    folder: Path,
    lock: Lock,
    manifest: Manifest,
    references: Sequence[str],
    registry: Source | None,
    *,
    without: Collection[str] = (),
) -> dict[str, tuple[str, ExpertRecord]]:
    """Look the new experts up.

    Args:
        folder: The folder they join.
        lock: What it is made of.
        manifest: What it was made from.
        references: References of the new experts.
        registry: Where they are.
        without: Names of the experts that leave it.

    Raises:
        PlanError: References that are unknown, double, or there already; everything at once.
        ConsentError: The owner of a new expert, or of one that is there, has opted out.
        BuildError: There are references and no registry.
    """
    if not references:
        return {}
    if registry is None:
        raise BuildError("Adding an expert needs the registry that holds it.")
    found: dict[str, tuple[str, ExpertRecord]] = {}
    whose: dict[str, Sequence[str]] = {}
    problems = []
    for reference in references:
        try:
            record = registry.expert(reference)
            parents = registry.parent_owners(registry.card(record))
        except CoterieError as error:
            problems.append(str(error))
            continue
        whose[record.ref] = (record.owner, *parents)
        problems += _joining_problems(record, whose[record.ref], lock, manifest, found)
        found[record.name] = (reference, record)
    if problems:
        raise PlanError(f"{folder} cannot be changed:", problems=problems)
    staying = {owner for expert in lock.experts if expert.name not in without for owner in expert.whose}
    _check_consent(folder, staying, whose, registry)
    return found


def _joining_problems(
    record: ExpertRecord, whose: Sequence[str], lock: Lock, manifest: Manifest, found: Collection[str]
) -> list[str]:
    if record.name in found:
        return [f"{record.name} is listed more than once"]
    if any(expert.digest == record.digest for expert in lock.experts):
        return [f"{record.ref} is there already"]
    return [
        f"{record.ref}: the folder's manifest leaves {owner} out (opt_out); build a new folder from a "
        "manifest that does not"
        for owner in whose
        if owner in manifest.opt_out
    ]


def _check_consent(
    folder: Path, staying: Collection[str], joining: Mapping[str, Sequence[str]], registry: Source
) -> None:
    """Refuse new experts of owners who are out, and old ones too: no fresh build would take them."""
    out = {entry.owner: entry for entry in registry.opt_outs()}
    new = [
        f"{ref}: {_when(out[owner])}" for ref, owners in joining.items() for owner in owners if owner in out
    ]
    if new:
        raise ConsentError(
            f"{folder} cannot be changed, since owners of the new experts have opted out:", problems=new
        )
    present = [_when(out[owner]) for owner in sorted(staying) if owner in out]
    if present:
        raise ConsentError(
            f"{folder} holds experts of owners who have opted out since it was built. Take them out first, with "
            "`coterie remove`:",
            problems=present,
        )


def _when(entry: OptOut) -> str:
    return f"{entry.owner} opted out on {entry.when} (recorded by {entry.who}): {entry.reason}"
