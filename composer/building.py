"""Builds a composed folder: links immutable files, writes a lock, and appears whole or not at all.

Copies no weights unless asked to; its time and memory do not grow with the bytes. Knows files and digests;
opens no tensor.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from composer.lineage import optout_class
from composer.lock import LOCK_NAME, Lock, LockedBase, LockedExpert
from composer.members import BASE_FOLDER, DESCRIPTION_NAME, PUBLIC_FOLDER
from composer.model_card import write_model_card
from composer.recipes import RECIPES
from experts.card import CARD_FILE
from experts.errors import BuildError
from experts.names import parse_reference

if TYPE_CHECKING:
    from composer.manifest import ExpertEntry
    from composer.planning import Plan, PlannedExpert
    from composer.recipes.base import Recipe
    from composer.source import Source

__all__ = ["build", "library_version", "link_file", "new_folder", "write_config"]

Progress = Callable[[str, int], None]
"""Called with the path and the bytes of every file that was linked or copied."""

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Files of the anchor that also stand at the top, so that ``AutoTokenizer.from_pretrained(out)`` works."""

_FICLONE = 0x40049409


def library_version() -> str:
    """Return coterie's version, or ``0+unknown`` when it runs from a tree that was not installed."""
    try:
        return version("coterie")
    except PackageNotFoundError:
        return "0+unknown"


def build(
    plan: Plan,
    out: Path | str,
    *,
    registry: Source,
    copy: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a composed folder.

    Args:
        plan: What to write.
        out: The folder; it must not exist.
        registry: Whose blobs are linked.
        copy: Whether to copy every file, so that the folder stands alone.
        progress: Told of every file.

    Returns:
        The folder.

    Raises:
        BuildError: ``out`` exists, its parent does not, or the disk is full. Nothing is left behind.
        IntegrityError: A blob is missing.
    """
    with new_folder(Path(out)) as staging:
        place = _Placer(staging, copy=copy, progress=progress)
        recipe: Recipe = RECIPES.load(plan.manifest.recipe)()
        _place_base(plan, registry, place, top=(*TOKENIZER_FILES, *recipe.top_files))
        for expert in plan.experts:
            _place_expert(expert, registry, place)
        lock = _lock(plan)
        (staging / LOCK_NAME).write_bytes(lock.to_bytes())
        recipe.write_files(staging, plan, lock)
        manifest = yaml.safe_dump(plan.manifest.to_dict(), sort_keys=False, allow_unicode=True)
        (staging / "manifest.yaml").write_text(manifest, encoding="utf-8")
        write_model_card(staging / "README.md", lock, description=plan.manifest.description)
    return Path(out)


class new_folder:  # noqa: N801 - used like a function
    """Context manager: yields a staging folder that becomes ``out`` on success and vanishes on any failure.

    Args:
        out: The final path.

    Raises:
        BuildError: ``out`` exists, its parent does not, or the file system refuses.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.staging: Path | None = None

    def __enter__(self) -> Path:
        if self.out.exists() or self.out.is_symlink():
            raise BuildError(f"The output folder {self.out} exists. Choose another name, or remove it first.")
        parent = self.out.absolute().parent
        if not parent.is_dir():
            raise BuildError(f"There is no folder {parent} to write {self.out.name} into. Create it first.")
        try:
            self.staging = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", dir=parent))
        except OSError as error:
            raise _os_error(error, self.out) from error
        return self.staging

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        assert self.staging is not None
        if error is None:
            try:
                _sync(self.staging)
                self.staging.chmod(0o755)
                self._publish()
                return
            except OSError as failure:
                shutil.rmtree(self.staging, ignore_errors=True)
                raise _os_error(failure, self.out) from failure
        shutil.rmtree(self.staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise _os_error(error, self.out) from error

    def _publish(self) -> None:
        assert self.staging is not None
        if self.out.exists():  # rename would replace an empty folder that appeared meanwhile
            raise FileExistsError(errno.EEXIST, "appeared meanwhile", str(self.out))
        self.staging.rename(self.out)
        _sync_folder(self.out.absolute().parent)


def _os_error(error: OSError, out: Path) -> BuildError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BuildError(
            f"No space left while writing {out}; nothing was kept. Free some space, or build on the registry's "
            "file system, where files are linked and need none."
        )
    return BuildError(f"Could not write {out}: {error.strerror or error}. Nothing was kept.")


def _sync(folder: Path) -> None:
    """Make the small files that were written, and every folder, durable; links need no data sync."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            _sync_folder(path)
        elif path.stat().st_nlink == 1:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Placer:
    """Puts immutable files into the staging folder."""

    def __init__(self, staging: Path, *, copy: bool, progress: Progress | None) -> None:
        self.staging = staging
        self.copy = copy
        self.progress = progress

    def __call__(self, source: Path, target: str) -> None:
        path = self.staging / target
        path.parent.mkdir(parents=True, exist_ok=True)
        link_file(source, path, copy=self.copy)
        if self.progress is not None:
            self.progress(target, path.stat().st_size)


def link_file(source: Path, target: Path, *, copy: bool = False) -> None:
    """Link ``source`` at ``target``: a hard link, else a reflink, else a copy.

    Args:
        source: An immutable file.
        target: A path that does not exist.
        copy: Whether to copy outright (a reflink shares the bytes until one side is changed).
    """
    if not copy:
        try:
            os.link(source, target)
            return
        except OSError as error:  # another file system, a link limit, a foreign owner
            if error.errno not in (errno.EXDEV, errno.EMLINK, errno.EPERM, errno.ENOTSUP):
                raise
        if _reflink(source, target):
            return
    shutil.copyfile(source, target)
    target.chmod(0o644)


def _reflink(source: Path, target: Path) -> bool:
    """Share extents where the file system can (btrfs, xfs); return whether it could."""
    with source.open("rb") as src, target.open("xb") as dst:
        try:
            fcntl.ioctl(dst.fileno(), _FICLONE, src.fileno())
            return True
        except OSError:
            pass
    target.unlink()
    return False


def _place_base(plan: Plan, registry: Source, place: _Placer, *, top: Collection[str]) -> None:
    for entry in plan.base.files:
        source = registry.blob_path(entry.sha256)
        place(source, f"{BASE_FOLDER}/{entry.path}")
        if entry.path in top:
            place(source, entry.path)
    (place.staging / DESCRIPTION_NAME).write_text(plan.base.description.to_json(), encoding="utf-8")
    if plan.base.routing is not None and plan.base.routing_sha256 is not None:
        source = registry.blob_path(plan.base.routing_sha256)
        place(source, f"{PUBLIC_FOLDER}/{plan.base.routing.file}")


def _place_expert(expert: PlannedExpert, registry: Source, place: _Placer) -> None:
    folder = f"experts/{expert.record.digest}"
    (place.staging / folder).mkdir(parents=True, exist_ok=True)
    (place.staging / folder / CARD_FILE).write_bytes(expert.card.to_bytes())
    for entry in expert.card.files:
        place(registry.blob_path(entry.sha256), f"{folder}/{entry.path}")


def _lock(plan: Plan) -> Lock:
    entries = {parse_reference(entry.ref)[0]: entry for entry in plan.manifest.experts}
    experts = tuple(_locked(expert, entries[expert.card.name]) for expert in plan.experts)
    lineage: dict[str, tuple[str, ...]] = {f"{BASE_FOLDER}/{entry.path}": () for entry in plan.base.files}
    if plan.base.routing is not None:
        lineage[f"{PUBLIC_FOLDER}/{plan.base.routing.file}"] = ()
    lineage |= {f"{e.folder}/{entry.path}": tuple(sorted(e.whose)) for e in experts for entry in e.files}
    return Lock.of_recipe(plan.manifest.recipe)(
        library_version=library_version(),
        name=plan.manifest.name,
        recipe=plan.manifest.recipe,
        manifest_sha256=plan.manifest.digest,
        base=LockedBase(
            name=plan.base.name,
            fingerprint=plan.base.fingerprint,
            tokenizer_fingerprint=plan.base.tokenizer_fingerprint,
            files=plan.base.files,
            routing=plan.base.routing,
            routing_sha256=plan.base.routing_sha256,
        ),
        router=plan.manifest.router,
        upcycle=plan.manifest.upcycle,
        dtype=plan.manifest.dtype,
        experts=experts,
        # a recipe may promise less than its files would allow, never more
        optout_class=plan.optout_class if plan.optout_class != "exact" else optout_class(lineage),
        lineage=lineage,
    )


def _locked(expert: PlannedExpert, entry: ExpertEntry) -> LockedExpert:
    card = expert.card
    return LockedExpert(
        name=card.name,
        version=card.version,
        owner=card.owner,
        digest=expert.record.digest,
        kind=card.kind,
        domain=card.domain,
        license=card.license,
        layers=card.layers,
        parameters=expert.record.parameters,
        files=card.files,
        positive_prompts=entry.positive_prompts,
        negative_prompts=entry.negative_prompts,
        parent_owners=expert.parent_owners,
    )


def write_config(staging: Path, plan: Plan, lock: Lock) -> None:
    """Write ``config.json`` without importing transformers: the anchor's configuration, wrapped."""
    import json

    base = dict(plan.base.description.config)
    config = {
        "model_type": "coterie",
        "architectures": ["ComposedForCausalLM"],
        "base_config": base,
        "composition": lock.membership_digest,
        "dtype": plan.manifest.dtype or base.get("dtype") or base.get("torch_dtype"),
    }
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
