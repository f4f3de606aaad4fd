"""Vectors that are not what was written: found when they are read for that, and never ranked without a word."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from experts.errors import DataError
from pipelines.cli.app import app
from pipelines.retrieval import segment as segment_module
from pipelines.retrieval.index import Index, create_index, open_index, owner_mask
from pipelines.retrieval.search import search_exactly

ROWS, DIMENSION, HEADER = 30, 8, 128
IDS = [f"d{row:02}" for row in range(ROWS)]
OWNERS = ["acme", "bob", None] * (ROWS // 3)
VECTORS = np.random.default_rng(0).standard_normal((ROWS, DIMENSION)).astype(np.float32)
QUERIES = np.random.default_rng(1).standard_normal((3, DIMENSION)).astype(np.float32)


def _made(folder: Path, backend: str = "exact") -> Index:
    if backend == "faiss":
        pytest.importorskip("faiss")
    index = create_index(folder, base="a" * 64, dimension=DIMENSION, backend=backend)
    index.add(IDS, VECTORS, OWNERS)
    index.save()
    return index


def _matrix(folder: Path) -> Path:
    return next(folder.glob("*.npy"))


def _put(folder: Path, row: int, value: float) -> None:
    with _matrix(folder).open("r+b") as stream:
        stream.seek(HEADER + 4 * (row * DIMENSION + 5))
        stream.write(np.array([value], dtype="<f4").tobytes())


def _flip(folder: Path, bit: int) -> None:
    data = bytearray(_matrix(folder).read_bytes())
    data[HEADER + bit // 8] ^= 1 << bit % 8
    _matrix(folder).write_bytes(data)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _as_before(folder: Path) -> None:
    """Make the files what earlier versions wrote: no digest of the matrix."""
    listing = _matrix(folder).with_suffix(".json")
    listed = json.loads(listing.read_text())
    del listed["matrix_sha256"]
    listing.write_text(json.dumps(listed))
    info = json.loads((folder / "index.json").read_text())
    info["segments"][0]["ids_sha256"] = hashlib.sha256(listing.read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(info))


def _not_written(folder: Path) -> str:
    return f"{folder} is damaged: {_matrix(folder).name} is not what was written. Index the documents again."


def _absurd(folder: Path, key: str) -> str:
    return (
        f"{_matrix(folder)} is damaged: the vector of document '{key}' holds numbers that are not finite or too large "
        "to compare. Index the documents again."
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e25, -1e19])
def test_no_document_disappears_beside_an_absurd_number(tmp_path: Path, value: float) -> None:
    folder = tmp_path / "index"
    _made(folder)
    clean = open_index(folder)
    allow = owner_mask(OWNERS, {"acme"})
    expected = clean.search(QUERIES, k=ROWS, allow=allow)
    _put(folder, 3, value)
    index = open_index(folder)
    for k in (1, 5, ROWS):
        with pytest.raises(DataError) as caught:
            index.search(QUERIES, k=k)
        assert str(caught.value) == _absurd(folder, "d03")
    assert index.search(QUERIES, k=ROWS, allow=allow) == expected  # it is acme's, and not read


def test_one_bad_row_is_no_silent_empty_answer_on_the_command_line(tmp_path: Path, pico: Any) -> None:
    corpus, folder = tmp_path / "corpus.jsonl", tmp_path / "index"
    rows = [{"_id": f"d{row}", "text": "ba be bi", "owner": ("acme", "bob")[row % 2]} for row in range(4)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, list(map(str, arguments)), prog_name="coterie")

    assert run("index", folder, "--base", pico.embedder(), "--corpus", corpus).exit_code == 0
    assert run("index", "show", folder, "--verify", "--json").exit_code == 0
    assert "\nverified:  yes\n" in run("index", "show", folder, "--verify").stdout
    with _matrix(folder).open("r+b") as stream:
        stream.seek(HEADER)
        stream.write(np.array([np.nan], dtype="<f4").tobytes())
    found = run("search", folder, pico.embedder(), "ba", "--json")
    assert (found.exit_code, found.stdout, found.stderr) == (2, "", f"Error: {_absurd(folder, 'd0')}\n")
    others = run("search", folder, pico.embedder(), "ba", "--json", "--opt-out", "acme")
    assert [hit["id"] for hit in json.loads(others.stdout)["documents"]] == ["d1", "d3"]
    assert run("index", "show", folder).exit_code == 0
    shown = run("index", "show", folder, "--verify")
    assert (shown.exit_code, shown.stdout, shown.stderr) == (2, "", f"Error: {_not_written(folder)}\n")


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    index = _made(folder)
    index.remove({"d00", "d17"})
    index.save()
    matrix = _matrix(folder)
    listed = json.loads(matrix.with_suffix(".json").read_text())
    assert listed["matrix_sha256"] == hashlib.sha256(matrix.read_bytes()).hexdigest()
    kept = [row for row in range(ROWS) if row not in (0, 17)]
    assert np.array_equal(np.load(matrix, allow_pickle=False), VECTORS[kept])
    open_index(folder, verify=True)


@pytest.mark.parametrize("piece", [1 << 24, 7 * 4 * DIMENSION])
@pytest.mark.parametrize("bit", [0, 1, 31 * 32 + 3, ROWS * DIMENSION * 32 - 9])
def test_one_bit_is_found_before_vectors_are_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bit: int, piece: int
) -> None:
    monkeypatch.setattr(segment_module, "_CHUNK_BYTES", piece)
    folder = tmp_path / "index"
    _made(folder)
    open_index(folder, verify=True)
    _flip(folder, bit)
    before = _bytes(folder)
    index = open_index(folder)
    with pytest.raises(DataError) as caught:
        open_index(folder, verify=True)
    assert str(caught.value) == _not_written(folder)
    with pytest.raises(DataError) as caught:
        index.remove({"d07"})
    assert str(caught.value) == _not_written(folder)
    assert (index.ids, _bytes(folder)) == (IDS, before)
    for number in range(40):  # more than an index keeps apart
        index.add([f"x{number}"], VECTORS[:1])
    with pytest.raises(DataError) as caught:
        index.save()
    assert str(caught.value).startswith(f"{folder} is damaged: ")
    assert _bytes(folder) == before
    _flip(folder, bit)  # back
    open_index(folder, verify=True)


def test_a_removal_that_fails_in_a_later_segment_leaves_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    index = _made(folder)
    index.add(["x", "y"], VECTORS[:2])
    index.save()
    last = folder / f"{index.info.segments[1].name}.npy"
    last.write_bytes(last.read_bytes()[:-1] + b"\x01")
    before = _bytes(folder)
    index = open_index(folder)
    with pytest.raises(DataError, match=rf"is damaged: {last.name} is not what was written\. "):
        index.remove({"d00", "x"})
    assert _bytes(folder) == before
    assert (len(index.ids), len(index.search(QUERIES, k=99)[0])) == (ROWS + 2, ROWS + 2)
    index.remove({"x", "y"})  # nothing of what is damaged stays
    index.save()
    open_index(folder, verify=True)


def test_an_index_of_an_earlier_version_is_read_and_gets_a_digest_when_it_is_written_anew(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "index"
    expected = _made(folder).search(QUERIES, k=5)
    _as_before(folder)
    index = open_index(folder)
    assert index.search(QUERIES, k=5) == expected
    with pytest.raises(DataError) as caught:
        open_index(folder, verify=True)
    assert str(caught.value) == (
        f"{folder} cannot be verified: an earlier version wrote {_matrix(folder).name}, and noted no digest of it. "
        "Index the documents again."
    )
    index.add(["x"], VECTORS[:1])
    index.save()
    index.remove({"d29"})
    index.save()
    index = open_index(folder, verify=True)
    ranking = [hit.id for hit in index.search(VECTORS[:1], k=99)[0]]
    assert sorted(ranking) == [*IDS[:-1], "x"]
    assert ranking.index("x") == ranking.index("d00") + 1  # the same vector


def test_numbers_that_are_absurd_get_no_digest(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    _made(folder)
    _as_before(folder)
    _put(folder, 4, np.nan)
    before = _bytes(folder)
    with pytest.raises(DataError) as caught:
        open_index(folder).remove({"d00"})
    assert str(caught.value) == _absurd(folder, "d04")
    assert _bytes(folder) == before


@pytest.mark.parametrize("backend", ["exact", "faiss"])
def test_vectors_out_of_all_proportion_are_not_added_or_looked_for(tmp_path: Path, backend: str) -> None:
    index = _made(tmp_path / "index", backend)
    large = VECTORS[:1] / np.linalg.norm(VECTORS[0]) * np.float32(1.01e18)
    message = "vector holds numbers that are too large to compare. Check the encoder."
    with pytest.raises(DataError) as caught:
        index.add(["x"], large)
    assert str(caught.value) == f"A {message}"
    with pytest.raises(DataError) as caught:
        index.search(large)
    assert str(caught.value) == f"A query's {message}"
    index.add(["x"], large / np.float32(1.02))
    assert "x" in {hit.id for hit in index.search(-large / np.float32(1.02), k=31)[0]}


def test_vectors_that_come_from_no_file_are_the_encoders_fault() -> None:
    wrong = VECTORS.copy()
    wrong[7, 0] = np.inf
    with pytest.raises(DataError) as caught:
        search_exactly([VECTORS, wrong], QUERIES, ids=[*IDS, *(f"e{row:02}" for row in range(ROWS))],
                       owners=[None] * 2 * ROWS, k=3, allow=None, dimension=DIMENSION)  # fmt: skip
    assert str(caught.value) == (
        "The vector of document 'e07' holds numbers that are not finite or too large to compare. Check the encoder."
    )


@pytest.mark.parametrize("reach", [1e-20, 1.0, 1e16])
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-25, 1e-20, 1.0, 1e16])
def test_size_changes_no_ranking(scale: float, reach: float) -> None:
    """Rows that differ by less than float32 rounds, against sums of fractions, from its small end to its large one."""
    generator = np.random.default_rng(7)
    values = generator.uniform(0.5, 1, 64)
    rows = np.array([generator.permutation(values) for _ in range(40)])
    matrix = (rows * (1 + 1e-7 * generator.standard_normal((40, 1))) * scale).astype(np.float32)
    query = np.full((1, 64), reach, dtype=np.float32)
    exact = [
        sum((Fraction(float(x)) * Fraction(float(query[0, 0])) for x in row), Fraction()) for row in matrix
    ]
    ids = [f"{row:02}" for row in range(40)]
    for k in (1, 4, 20):
        (found,) = search_exactly([matrix], query, ids=ids, owners=[None] * 40, k=k, allow=None, dimension=64)
        expected = sorted(range(40), key=lambda row: (-exact[row], row))[:k]
        assert [int(hit.id) for hit in found] == expected
