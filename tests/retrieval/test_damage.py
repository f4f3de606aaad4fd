"""Files of an index that are not what was written: one message each, exit code 2, and nothing changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from experts.errors import DataError
from pipelines.cli.app import app
from pipelines.retrieval.index import Index, create_index, open_index

ROWS, DIMENSION = 12, 16
IDS = [f"d{row:02}" for row in range(ROWS)]
VECTORS = np.random.default_rng(0).standard_normal((ROWS, DIMENSION)).astype(np.float32)

Damage = Callable[[Path], object]


def _made(folder: Path, backend: str = "exact") -> Index:
    if backend == "faiss":
        pytest.importorskip("faiss")
    index = create_index(folder, base="a" * 64, dimension=DIMENSION, backend=backend)
    index.add(IDS, VECTORS, ["acme", "bob"] * (ROWS // 2))
    index.save()
    return index


def _matrix(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.suffix in (".npy", ".faiss"))


def _listing(folder: Path) -> Path:
    return _matrix(folder).with_suffix(".json")


def _rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def _relist(change: Callable[[Any], Any]) -> Damage:
    """Change a listing, and its digest with it, so that only its content is wrong."""

    def damage(folder: Path) -> None:
        path = _listing(folder)
        _rewrite(path, change)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        _rewrite(
            folder / "index.json",
            lambda info: {**info, "segments": [{**info["segments"][0], "ids_sha256": digest}]},
        )

    return damage


def _to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _bytes(folder: Path) -> dict[str, bytes | None]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


_NO_MATRIX = (
    "{folder} is damaged: {segment}.npy is not the matrix of 12 x 16 float32 numbers that was written. "
)
_AGAIN = "Index the documents again."
_TORN = VECTORS.tobytes()

DAMAGES: dict[str, tuple[Damage, str]] = {
    "an empty matrix": (lambda f: _matrix(f).write_bytes(b""), _NO_MATRIX + _AGAIN),
    "a zip archive": (lambda f: _matrix(f).write_bytes(b"PK\x03\x04" + _TORN), _NO_MATRIX + _AGAIN),
    "random bytes": (lambda f: _matrix(f).write_bytes(b"\x80\x04" + _TORN), _NO_MATRIX + _AGAIN),
    "a truncated matrix": (
        lambda f: _matrix(f).write_bytes(_matrix(f).read_bytes()[:-8]),
        _NO_MATRIX + _AGAIN,
    ),
    "a header alone": (lambda f: _matrix(f).write_bytes(_matrix(f).read_bytes()[:128]), _NO_MATRIX + _AGAIN),
    "a longer matrix": (
        lambda f: _matrix(f).write_bytes(_matrix(f).read_bytes() + b"\0"),
        _NO_MATRIX + _AGAIN,
    ),
    "another type": (lambda f: np.save(_matrix(f), VECTORS.astype(np.int32)), _NO_MATRIX + _AGAIN),
    "another precision": (lambda f: np.save(_matrix(f), VECTORS.astype(np.float64)), _NO_MATRIX + _AGAIN),
    "another shape": (lambda f: np.save(_matrix(f), VECTORS.reshape(16, 12)), _NO_MATRIX + _AGAIN),
    "another order": (lambda f: np.save(_matrix(f), np.asfortranarray(VECTORS)), _NO_MATRIX + _AGAIN),
    "a pickle": (
        lambda f: np.save(_matrix(f), np.array([{}], dtype=object), allow_pickle=True),
        _NO_MATRIX + _AGAIN,
    ),
    "no matrix": (lambda f: _matrix(f).unlink(), "{folder} is damaged: {segment}.npy is missing. " + _AGAIN),
    "a folder for a matrix": (
        lambda f: _to_folder(_matrix(f)),
        "'{folder}/{segment}.npy' is a folder; a regular file is needed.",
    ),
    "a pipe for a matrix": (
        lambda f: _to_fifo(_matrix(f)),
        "'{folder}/{segment}.npy' is a FIFO; a regular file is needed.",
    ),
    "no listing": (
        lambda f: _listing(f).unlink(),
        "{folder} is damaged: {segment}.json is missing. " + _AGAIN,
    ),
    "a folder for a listing": (
        lambda f: _to_folder(_listing(f)),
        "'{folder}/{segment}.json' is a folder; a regular file is needed.",
    ),
    "an empty listing": (
        lambda f: _listing(f).write_bytes(b""),
        "{folder} is damaged: {segment}.json is not what was written. " + _AGAIN,
    ),
    "a listing that is a list": (
        _relist(lambda listed: [listed]),
        "{folder} is damaged: {segment}.json is no list of ids and owners. " + _AGAIN,
    ),
    "a listing without ids": (
        _relist(lambda listed: {"owners": listed["owners"]}),
        "{folder} is damaged: {segment}.json is no list of ids and owners. " + _AGAIN,
    ),
    "ids that are numbers": (
        _relist(lambda listed: {**listed, "ids": list(range(ROWS))}),
        "{folder} is damaged: {segment}.json is no list of ids and owners. " + _AGAIN,
    ),
    "fewer ids": (
        _relist(lambda listed: {**listed, "ids": IDS[:3]}),
        "{folder} is damaged: {segment}.json lists 3 ids and 12 owners of 12 documents. " + _AGAIN,
    ),
    "more owners": (
        _relist(lambda listed: {**listed, "owners": [None] * 13}),
        "{folder} is damaged: {segment}.json lists 12 ids and 13 owners of 12 documents. " + _AGAIN,
    ),
    "an id twice": (
        _relist(lambda listed: {**listed, "ids": [*IDS[:-1], "d00"]}),
        "{folder} is damaged: it lists the document 'd00' twice. " + _AGAIN,
    ),
    "a segment twice": (
        lambda f: _rewrite(f / "index.json", lambda info: {**info, "segments": info["segments"] * 2}),
        "{folder}/index.json has 1 problem:\n  - {segment} is named twice; index the documents again",
    ),
    "more documents": (
        lambda f: _rewrite(
            f / "index.json",
            lambda info: {**info, "segments": [{**info["segments"][0], "documents": 1 << 50}]},
        ),
        "{folder} is damaged: {segment}.json lists 12 ids and 12 owners of 1125899906842624 documents. "
        + _AGAIN,
    ),
    "another dimension": (
        lambda f: _rewrite(f / "index.json", lambda info: {**info, "dimension": 8}),
        "{folder} is damaged: {segment}.npy is not the matrix of 12 x 8 float32 numbers that was written. "
        + _AGAIN,
    ),
    "a list": (
        lambda f: _rewrite(f / "index.json", lambda info: [info]),
        "{folder}/index.json has 1 problem:\n  - input should be an object",
    ),
    "an empty index.json": (
        lambda f: (f / "index.json").write_bytes(b""),
        "{folder}/index.json, line 1, column 1: not valid JSON: Expecting value.",
    ),
    "no text": (
        lambda f: (f / "index.json").write_bytes(b"\xff\xfe\x00"),
        "{folder}/index.json: not UTF-8 text (byte 0).",
    ),
    "no index.json": (
        lambda f: (f / "index.json").unlink(),
        "{folder} is not an index: it holds no index.json. Make one with 'coterie index'.",
    ),
}


def _expected(message: str, folder: Path) -> str:
    names = {path.name.partition(".")[0] for path in folder.iterdir() if path.name.startswith("segment-")}
    return message.format(folder=folder, segment=next(iter(names)))


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_has_one_message(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    folder = tmp_path / "index"
    _made(folder)
    damage(folder)
    expected, before = _expected(message, folder), _bytes(folder)
    with pytest.raises(DataError) as caught:
        open_index(folder)
    assert str(caught.value) == expected
    for command in (
        ("index", "show", folder),
        ("index", "remove", folder, "--id", "d00"),
        ("search", folder, "model", "a"),
    ):
        outcome = CliRunner().invoke(app, list(map(str, command)), prog_name="coterie")
        assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (2, "", f"Error: {expected}\n")
    assert _bytes(folder) == before


def test_the_matrix_is_one_that_numpy_reads(tmp_path: Path) -> None:
    _made(tmp_path / "index")
    assert np.array_equal(np.load(_matrix(tmp_path / "index"), allow_pickle=False), VECTORS)


def test_a_list_that_breaks_under_a_writer_is_not_written_over(tmp_path: Path) -> None:
    index = _made(tmp_path / "index")
    (tmp_path / "index" / "index.json").write_bytes(b"{")
    with pytest.raises(DataError) as caught:
        index.save()
    assert str(caught.value) == (
        f"Another process changed {tmp_path / 'index'} meanwhile. Nothing was written; do it again."
    )
    assert (tmp_path / "index" / "index.json").read_bytes() == b"{"


def _repack(make: Callable[[Any], Any]) -> Damage:
    """Put another index of faiss's there, with digests that fit."""

    def damage(folder: Path) -> None:
        import faiss

        packed = faiss.serialize_index(make(faiss)).tobytes()
        _matrix(folder).write_bytes(packed)
        digest = hashlib.sha256(packed).hexdigest()
        _relist(lambda listed: {**listed, "faiss_sha256": digest})(folder)

    return damage


def _garbage(folder: Path) -> None:
    _matrix(folder).write_bytes(b"IxFI")
    digest = hashlib.sha256(b"IxFI").hexdigest()
    _relist(lambda listed: {**listed, "faiss_sha256": digest})(folder)


def _second_segment(info: Any) -> Any:
    other = {**info["segments"][0], "name": "segment-" + "0" * 16}
    return {**info, "segments": [*info["segments"], other]}


_FLAT = "{folder} is damaged: {segment}.faiss is no flat index of 12 x 16 numbers. " + _AGAIN

FAISS_DAMAGES: dict[str, tuple[Damage, str]] = {
    "an empty file": (
        lambda f: _matrix(f).write_bytes(b""),
        "{folder} is damaged: {segment}.faiss is not what was written. " + _AGAIN,
    ),
    "no digest": (
        _relist(lambda listed: {"ids": listed["ids"], "owners": listed["owners"]}),
        "{folder} is damaged: {segment}.faiss is not what was written. " + _AGAIN,
    ),
    "a folder": (
        lambda f: _to_folder(_matrix(f)),
        "'{folder}/{segment}.faiss' is a folder; a regular file is needed.",
    ),
    "no file": (lambda f: _matrix(f).unlink(), "{folder} is damaged: {segment}.faiss is missing. " + _AGAIN),
    "garbage": (_garbage, _FLAT),
    "distances": (_repack(lambda faiss: faiss.IndexFlatL2(DIMENSION)), _FLAT),
    "no vectors": (_repack(lambda faiss: faiss.IndexFlatIP(DIMENSION)), _FLAT),
    "an id twice": (
        _relist(lambda listed: {**listed, "ids": ["d00"] * ROWS}),
        "{folder} is damaged: it lists the document 'd00' twice. " + _AGAIN,
    ),
    "two segments": (
        lambda f: _rewrite(f / "index.json", _second_segment),
        "{folder}/index.json has 1 problem:\n"
        "  - faiss keeps one segment, and 2 are named; index the documents again",
    ),
    "the other backend": (
        lambda f: _rewrite(f / "index.json", lambda info: {**info, "backend": "exact"}),
        "{folder} is damaged: {segment}.npy is missing. " + _AGAIN,
    ),
}


@pytest.mark.parametrize("name", FAISS_DAMAGES)
def test_damage_to_faiss_has_one_message(tmp_path: Path, name: str) -> None:
    damage, message = FAISS_DAMAGES[name]
    folder = tmp_path / "index"
    _made(folder, "faiss")
    damage(folder)
    before = _bytes(folder)
    with pytest.raises(DataError) as caught:
        open_index(folder)
    assert str(caught.value) == _expected(message, folder)
    assert _bytes(folder) == before
