"""Packing what a training run left behind into an expert folder that can be published, and reading one back.

Copies only the kind's own files, takes the owner's paths out of the configuration, writes the card and admits
the result by the same checks as the registry. Knows folders; knows nothing of the registry.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Literal

from experts.admission import check_expert
from experts.base import BaseDescription
from experts.card import CARD_FILE, MAX_CARD_BYTES, BaseRef, ExpertCard, FileEntry, Terms, TrainingInfo
from experts.errors import AdmissionError, CardError, ExpertWarning
from experts.files import (
    capped,
    copy_file,
    describe_mode,
    fsync_folder,
    read_bounded,
    sha256_file,
    write_atomic,
)
from experts.kinds import detect_kind, get_kind
from experts.kinds.kind import ExpertKind
from experts.license import check_license
from experts.names import check_expert_name
from experts.routing_artifacts import ROUTING_FILE, RoutingInfo

__all__ = ["pack", "read_package"]

_LEFT_BEHIND = frozenset(
    {
        "README.md",
        ".gitattributes",
        "added_tokens.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    }
)
"""What trainers usually write beside an adapter: allowed in the raw folder, never copied. (PEFT's README names
the path of the base on the owner's machine.)"""


def read_package(folder: Path) -> ExpertCard:
    """Read the card of a packed expert; its files are not looked at.

    Raises:
        CardError: There is no card, or it is not well formed.
    """
    path = folder / CARD_FILE
    if not path.exists() and not path.is_symlink():
        raise CardError(f"'{folder}' holds no {CARD_FILE}; pack the expert first.")
    data = read_bounded(path, max_bytes=MAX_CARD_BYTES, error=CardError)
    return ExpertCard.from_bytes(data, what=f"'{path}'")


def pack(
    folder: Path,
    staging: Path,
    *,
    name: str,
    version: int,
    domain: str,
    license: str,
    base: BaseDescription,
    base_ref: BaseRef,
    training: TrainingInfo | None = None,
    routing: RoutingInfo | None = None,
    metrics: Mapping[str, float] | None = None,
    description: str = "",
    terms: Terms | None = None,
    derived_from: tuple[str, ...] = (),
    optout_class: Literal["exact", "recompose", "retrain"] = "exact",
    kind: str | None = None,
) -> ExpertCard:
    """Make a publishable expert out of a PEFT adapter folder, a folder of kind ``ffn``, or a whole model or encoder.

    Nothing appears under ``staging`` unless everything succeeded.

    Args:
        folder: The raw folder. May hold what trainers write beside an adapter; that is left behind.
        staging: The folder to make; it must not exist, or be empty.
        name: ``owner/expert``.
        version: From 1.
        domain: What the expert is for, one label.
        license: SPDX expression.
        base: The anchor.
        base_ref: How the card refers to it.
        training: How it was trained; None: not known.
        routing: What the routing artefacts in the folder are; None: there are none.
        metrics: Finite numbers by name.
        description: Free text.
        terms: What the owner allows beyond the licence.
        derived_from: Digests of the cards this expert was made from.
        optout_class: What opting out of it can mean; that of what it was made from.
        kind: The kind of expert; None: told from the files.

    Raises:
        AdmissionError: The folder holds something that is not allowed, or ``staging`` is in use.
        CardError: A field of the card is not allowed.
        ExpertWarning: (a warning) A whole model is the base itself.
        UnknownNameError: ``name`` or ``kind`` is malformed or unknown.
    """
    owner = check_expert_name(name).partition("/")[0]
    checked_license = check_license(license)
    if staging.exists() and (not staging.is_dir() or any(staging.iterdir())):
        raise AdmissionError(f"'{staging}' exists and is not an empty folder; name another one.")
    expert_kind = (
        get_kind(kind).form({path.name for path in folder.iterdir()})
        if kind
        else detect_kind(folder, embeds=base.embedding is not None)
    )
    expert_kind.check_base(base)
    _check_raw(folder, expert_kind, routing)
    expert_kind.check_raw(folder, base, base_ref)
    partial = _partial_folder(staging)
    try:
        config = _copy_config(folder, partial, expert_kind, base_ref)
        resolved = expert_kind.resolve(config, base)
        remarks = expert_kind.install_weights(folder, partial / expert_kind.weights_file, base)
        expert_kind.install_more(folder, partial)
        if routing is not None:
            copy_file(folder / routing.file, partial / routing.file)
        card = ExpertCard.create(
            format_version=1,
            library_version=_library_version(),
            name=name,
            version=version,
            owner=owner,
            domain=domain,
            kind=expert_kind.name,
            license=checked_license,
            base=base_ref,
            layers=resolved.layers,
            rank=resolved.rank,
            files=_entries(partial),
            training=training or TrainingInfo(method="unknown"),
            routing=routing,
            metrics=dict(metrics or {}),
            terms=terms or Terms(),
            derived_from=derived_from,
            optout_class=optout_class,
            description=description,
        )
        write_atomic(partial / CARD_FILE, card.to_bytes())
        check_expert(partial, card, base)
        partial.replace(staging)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync_folder(staging.parent)
    for remark in remarks:
        warnings.warn(f"{name}: {remark}", ExpertWarning, stacklevel=2)
    return card


def _check_raw(folder: Path, kind: ExpertKind, routing: RoutingInfo | None) -> None:
    """Refuse links, special files, and files that have no place beside an expert, before anything is read."""
    if (folder / CARD_FILE).exists():
        raise AdmissionError(f"'{folder}' is packed already: it holds {CARD_FILE}. Register it as it is.")
    wanted = {*kind.raw_files(folder), *([routing.file] if routing else [])}
    allowed = wanted | _LEFT_BEHIND | kind.left_behind
    found = {path.name: path.lstat() for path in sorted(folder.iterdir())}
    problems = [f"{name}: missing" for name in sorted(wanted - set(found))]
    for name, info in found.items():
        if name == ROUTING_FILE and routing is None:
            problems.append(f"{name}: not described; say what it holds (routing=...) or remove it")
        elif name in kind.folders_left_behind and stat.S_ISDIR(info.st_mode):
            continue
        elif name not in allowed:
            problems.append(
                f"{name}: {describe_mode(info.st_mode)} that is no part of a {kind.name} expert; remove it"
            )
        elif stat.S_ISLNK(info.st_mode) and kind.links_allowed:
            continue
        elif not stat.S_ISREG(info.st_mode):
            problems.append(f"{name}: {describe_mode(info.st_mode)}; a regular file is needed")
        elif info.st_nlink != 1 and not kind.links_allowed:
            problems.append(f"{name}: has {info.st_nlink} hard links; copy the file")
    if problems:
        raise AdmissionError(f"'{folder}' cannot be packed:", problems=capped(problems))


def _partial_folder(staging: Path) -> Path:
    staging.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=staging.parent, prefix=f".{staging.name}.", suffix=".partial"))
    partial.chmod(0o755 & ~_umask())
    return partial


def _umask() -> int:
    # the mask can only be read by setting it
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _copy_config(folder: Path, target: Path, kind: ExpertKind, base_ref: BaseRef) -> dict[str, object]:
    """Write the configuration without the owner's paths; return it."""
    config = kind.sanitize_config(kind.read_config(folder / kind.config_file), base_ref)
    # the order of keys is kept: the first pattern that matches decides a rank
    write_atomic(target / kind.config_file, (json.dumps(config, indent=2) + "\n").encode())
    return config


def _entries(folder: Path) -> tuple[FileEntry, ...]:
    return tuple(
        FileEntry(path=path.name, size=path.stat().st_size, sha256=sha256_file(path))
        for path in sorted(folder.iterdir())
    )


def _library_version() -> str:
    try:
        return metadata.version("coterie")
    except metadata.PackageNotFoundError:
        return "unknown"
