"""The blob store against hashlib and the file system itself."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from experts.errors import IntegrityError
from registry.blobs import BlobStore
from registry.filesystem import FileSystem


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    store = BlobStore(tmp_path, files=FileSystem())
    (tmp_path / "blobs").mkdir()
    store.make_folders()
    return store


def publish(store: BlobStore, data: bytes) -> str:
    with store.staging() as staging:
        sha256 = staging.add(data, "file")
        staging.publish()
    return sha256


def copy(store: BlobStore, source: Path, **options: Any) -> tuple[int, str]:
    descriptor = os.open(source, os.O_RDONLY)
    try:
        with store.staging() as staging:
            result = staging.copy(descriptor, "deep/er/file", **options)
            staging.publish()
        return result
    finally:
        os.close(descriptor)


def test_a_blob_lies_under_its_digest_and_cannot_be_written(store: BlobStore, tmp_path: Path) -> None:
    sha256 = publish(store, b"hello")
    path = tmp_path / "blobs" / "sha256" / sha256[:2] / sha256
    assert sha256 == hashlib.sha256(b"hello").hexdigest()
    assert path.read_bytes() == b"hello"
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert store.read(sha256) == b"hello"
    assert list(store) == [sha256]
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (3 << 20) + 7])
def test_a_file_is_copied_whole_at_every_chunk_border(store: BlobStore, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "source").write_bytes(data)
    pieces: list[int] = []
    assert copy(store, tmp_path / "source", limit=size, progress=pieces.append) == (
        size,
        hashlib.sha256(data).hexdigest(),
    )
    assert store.read(hashlib.sha256(data).hexdigest()) == data
    assert sum(pieces) == size


def test_copying_stops_at_the_declared_size(store: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"12345")
    with pytest.raises(IntegrityError) as caught:
        copy(store, tmp_path / "source", limit=4)
    assert str(caught.value) == "'deep/er/file' has more than the 4 bytes that its card declares."
    assert list(store) == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_flipped_byte_is_found_on_reading(store: BlobStore, tmp_path: Path) -> None:
    sha256 = publish(store, b"hello")
    path = store.path(sha256)
    path.chmod(0o644)
    path.write_bytes(b"hellp")
    found = hashlib.sha256(b"hellp").hexdigest()
    assert store.state(sha256) == "altered"
    with pytest.raises(IntegrityError) as caught:
        store.read(sha256)
    assert str(caught.value) == (
        f"The blob sha256:{sha256} in the registry '{tmp_path}' is damaged: its bytes have the digest "
        f"sha256:{found}. Add again the base or expert that it belongs to, which replaces it."
    )


def test_a_missing_blob_is_named(store: BlobStore, tmp_path: Path) -> None:
    sha256 = "0" * 64
    assert store.state(sha256) == "missing"
    with pytest.raises(IntegrityError) as caught:
        store.require(sha256)
    assert str(caught.value) == (
        f"The blob sha256:{sha256} is missing from the registry '{tmp_path}': restore it from a copy, or add "
        "again the base or expert that it belongs to."
    )


def test_publishing_again_replaces_a_damaged_blob_and_keeps_an_intact_one(store: BlobStore) -> None:
    sha256 = publish(store, b"hello")
    inode = store.path(sha256).stat().st_ino
    publish(store, b"hello")
    assert store.path(sha256).stat().st_ino == inode  # links to it go on sharing its bytes
    store.path(sha256).chmod(0o644)
    store.path(sha256).write_bytes(b"other")
    publish(store, b"hello")
    assert store.read(sha256) == b"hello"


def test_equal_files_are_one_blob(store: BlobStore) -> None:
    with store.staging() as staging:
        assert staging.add(b"same", "one") == staging.add(b"same", "two")
        staging.publish()
    assert len(list(store)) == 1


def test_nothing_is_published_when_the_staging_fails(store: BlobStore, tmp_path: Path) -> None:
    def fail() -> None:
        with store.staging() as staging:
            staging.add(b"hello", "file")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(store) == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_only_abandoned_leftovers_are_cleaned(store: BlobStore, tmp_path: Path) -> None:
    old, young = tmp_path / "tmp" / "1-old", tmp_path / "tmp" / "2-young"
    for folder in (old, young):
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "file").write_bytes(b"half")
    past = time.time() - 7200
    for path in (old / "inner" / "file", old / "inner", old, young):
        os.utime(path, (past, past))  # young's inner file is still being written
    assert store.abandoned() == [old]
    store.clean()
    assert list((tmp_path / "tmp").iterdir()) == [young]


def test_bytes_reach_the_disk_before_their_name_and_the_name_before_the_end(
    tmp_path: Path, faulty: Any
) -> None:
    files = faulty()
    store = BlobStore(tmp_path, files=files)
    (tmp_path / "blobs").mkdir()
    store.make_folders()
    start = len(files.calls)
    publish(store, b"h")
    assert files.calls[start:] == [
        "make_folder",  # the staging folder
        *("create", "write", "sync"),
        *("make_folder", "protect", "rename"),
        *("sync_folder", "sync_folder"),  # the blob's folder and the one above
        "remove_folder",
    ]


def test_the_store_writes_through_no_name_that_somebody_placed(tmp_path: Path) -> None:
    (tmp_path / "trap").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        FileSystem().create(tmp_path / "trap")
    assert not (tmp_path / "elsewhere").exists()
