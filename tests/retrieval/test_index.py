"""The index against a product in full, its files, and what survives a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import CoterieError, DataError
from pipelines.retrieval import search as search_module
from pipelines.retrieval.index import Index, create_index, open_index, owner_mask

BASE, OTHER = "a" * 64, "b" * 64
DIMENSION = 16
BACKENDS = ["exact", "faiss"]


def _vectors(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal((count, DIMENSION)).astype(np.float32)


def _index(folder: Path, backend: str = "exact") -> Index:
    if backend == "faiss":
        pytest.importorskip("faiss")
    return create_index(folder, base=BASE, dimension=DIMENSION, backend=backend)


def _filled(folder: Path, backend: str = "exact", count: int = 50) -> Index:
    index = _index(folder, backend)
    vectors = _vectors(count)
    owners = [("acme", "bob", None)[row % 3] for row in range(count)]
    ids = [f"d{row:03}" for row in range(count)]
    half = count // 2
    index.add(ids[:half], vectors[:half], owners[:half])
    index.add(ids[half:], vectors[half:], owners[half:])
    index.save()
    return index


def _expected(query: Any, rows: dict[str, Any], k: int) -> list[str]:
    """Ids by inner product in float64, then by id, without any of the code."""
    scores = {
        key: float(np.dot(vector.astype(np.float64), query.astype(np.float64)))
        for key, vector in rows.items()
    }
    return sorted(scores, key=lambda key: (-round(scores[key], 12), key))[:k]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_found_is_what_a_product_in_full_finds(tmp_path: Path, backend: str) -> None:
    _filled(tmp_path / "index", backend)
    index = open_index(tmp_path / "index", base=BASE)
    rows = dict(zip([f"d{row:03}" for row in range(50)], _vectors(50), strict=True))
    queries = _vectors(7, seed=1)
    for query, hits in zip(queries, index.search(queries, k=5), strict=True):
        assert [hit.id for hit in hits] == _expected(query, rows, 5)
        assert hits[0].score == pytest.approx(float(query @ rows[hits[0].id]), abs=1e-4)
        assert all(hit.owner == ("acme", "bob", None)[int(hit.id[1:]) % 3] for hit in hits)
    assert [len(hits) for hits in index.search(queries, k=500)] == [50] * 7


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_owners_documents_can_be_left_out(tmp_path: Path, backend: str) -> None:
    index = _filled(tmp_path / "index", backend)
    queries = _vectors(4, seed=2)
    allow = owner_mask(index.owners, {"acme"})
    found = index.search(queries, k=50, allow=allow)
    never = _index(tmp_path / "never", backend)
    kept = [row for row, owner in enumerate(index.owners) if owner != "acme"]
    never.add([index.ids[row] for row in kept], _vectors(50)[kept], [index.owners[row] for row in kept])
    assert found == never.search(queries, k=50)  # scores bit for bit
    assert len(found[0]) == len(kept)
    nobody = owner_mask(index.owners, {"acme", "bob"})
    assert all(hit.owner is None for hits in index.search(queries, k=50, allow=nobody) for hit in hits)


def test_poison_in_rows_that_are_not_allowed_is_never_read(tmp_path: Path) -> None:
    index = _filled(tmp_path / "index")
    path = next((tmp_path / "index").glob("segment-*.npy"))
    rows = np.load(path, mmap_mode="r+")
    rows[:, :] = np.nan
    rows.flush()
    poisoned = open_index(tmp_path / "index")
    clean = [not np.isnan(row).any() for segment in poisoned._segments for row in segment.rows]  # type: ignore[attr-defined]
    hits = poisoned.search(_vectors(1, seed=3), k=50, allow=np.array(clean))[0]
    assert len(hits) == sum(clean) == len(index.ids) // 2
    assert all(np.isfinite(hit.score) for hit in hits)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_chunks_segments_and_order_change_nothing(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 40))
    # few distinct values, so that scores tie often
    values = data.draw(st.lists(st.integers(-2, 2), min_size=count * 4, max_size=count * 4))
    rows = np.array(values, dtype=np.float32).reshape(count, 4) * np.float32(0.1)
    query = np.array([data.draw(st.lists(st.integers(-3, 3), min_size=4, max_size=4))], dtype=np.float32) / 7
    k = data.draw(st.integers(1, count))
    ids = [f"{number:02}" for number in range(count)]
    whole = _search([rows], query, ids, k)
    cut = data.draw(st.integers(1, count))
    order = data.draw(st.permutations(range(count)))
    parts = [rows[order[:cut]], rows[order[cut:]]]
    assert _search([part for part in parts if len(part)], query, [ids[row] for row in order], k) == whole
    assert [hit.id for hit in whole] == _expected(query[0], dict(zip(ids, rows, strict=True)), k)


def _search(parts: Any, query: Any, ids: Any, k: int) -> Any:
    return search_module.search_exactly(
        parts, query, ids=ids, owners=[None] * len(ids), k=k, allow=None, dimension=query.shape[1]
    )[0]


def test_small_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = _filled(tmp_path / "index")
    queries = _vectors(70, seed=4)
    before = index.search(queries, k=7)
    monkeypatch.setattr(search_module, "_CHUNK_BYTES", 4 * DIMENSION * 3)
    assert index.search(queries, k=7) == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_removing_equals_never_having_added(tmp_path: Path, backend: str) -> None:
    index = _filled(tmp_path / "index", backend)
    gone = {f"d{row:03}" for row in (0, 3, 24, 25, 49)}
    vector = _vectors(50)[3].tobytes()
    assert any(vector in path.read_bytes() for path in (tmp_path / "index").iterdir())
    index.remove(gone)
    index.save()
    index = open_index(tmp_path / "index")
    never = _index(tmp_path / "never", backend)
    kept = [row for row in range(50) if f"d{row:03}" not in gone]
    never.add(
        [f"d{row:03}" for row in kept], _vectors(50)[kept], [("acme", "bob", None)[row % 3] for row in kept]
    )
    queries = _vectors(5, seed=5)
    assert index.search(queries, k=60) == never.search(queries, k=60)
    assert not any(vector in path.read_bytes() for path in (tmp_path / "index").iterdir())
    assert not any(b"d003" in path.read_bytes() for path in (tmp_path / "index").iterdir())


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_removed_leaves_an_empty_index(tmp_path: Path, backend: str) -> None:
    index = _filled(tmp_path / "index", backend)
    index.remove(list(index.ids))
    index.save()
    index = open_index(tmp_path / "index")
    assert index.search(_vectors(2), k=3) == [[], []]
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["index.json"]


def test_many_small_additions_become_one_matrix(tmp_path: Path) -> None:
    index = _index(tmp_path / "index")
    vectors = _vectors(40)
    for row in range(40):
        index.add([f"{row:02}"], vectors[row : row + 1])
        index.save()
    assert len(list((tmp_path / "index").glob("*.npy"))) < 33
    again = open_index(tmp_path / "index")
    assert again.ids == [f"{row:02}" for row in range(40)]
    assert again.search(vectors[17:18], k=1)[0][0].id == index.search(vectors[17:18], k=1)[0][0].id


def test_another_base_is_refused(tmp_path: Path) -> None:
    _filled(tmp_path / "index")
    with pytest.raises(DataError) as caught:
        open_index(tmp_path / "index", base=OTHER)
    assert str(caught.value) == (
        f"{tmp_path / 'index'} was built by another base (aaaaaaaaaaaa) than this model's (bbbbbbbbbbbb), or by "
        "the same one with another pooling, normalisation, prompt or max length; their vectors cannot be compared. Use "
        "the model's own base, or index the documents again."
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_fit_is_refused(tmp_path: Path, backend: str) -> None:
    index = _filled(tmp_path / "index", backend)
    wrong = _vectors(1)
    wrong[0, 0] = np.nan
    cases: list[tuple[Any, str]] = [
        (
            lambda: index.add(["d001"], _vectors(1)),
            "The document 'd001' is in the index already. Remove it first; ",
        ),
        (
            lambda: index.add(["x", "x"], _vectors(2)),
            "2 ids were given, and 1 of them twice. Ids are unique.",
        ),
        (
            lambda: index.add(["x"], _vectors(2)),
            "Vectors of shape (2, 16) were given; 1 vectors of 16 numbers are needed.",
        ),
        (lambda: index.add(["x", "y"], iter([_vectors(1)])), "1 vectors were given for 2 documents."),
        (
            lambda: index.add(["x"], _vectors(1), []),
            "1 ids and 0 owners were given; each document has one of ",
        ),
        (lambda: index.add(["x"], wrong), "A vector holds numbers that are not finite. Check the encoder."),
        (lambda: index.remove({"d001", "x"}), "The index holds no document 'x' (1 of 2 are unknown)."),
        (
            lambda: index.search(_vectors(1)[:, :3]),
            "Queries of shape (1, 3) were given; the index needs (queries, 16).",
        ),
        (
            lambda: index.search(wrong),
            "A query's vector holds numbers that are not finite. Check the encoder.",
        ),
        (lambda: index.search(_vectors(1), k=0), "0 documents were asked for; at least 1 is needed."),
        (
            lambda: index.search(_vectors(1), allow=np.array([True])),
            "A mask of shape (1,) was given; the index holds 50 documents.",
        ),
    ]
    for call, message in cases:
        with pytest.raises(DataError) as caught:
            call()
        assert str(caught.value).startswith(message)
    assert len(index.ids) == 50
    index.save()
    again = open_index(tmp_path / "index")
    assert again.search(_vectors(3, seed=8), k=50) == index.search(_vectors(3, seed=8), k=50)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_may_come_piece_by_piece(tmp_path: Path, backend: str) -> None:
    whole = _filled(tmp_path / "whole", backend)
    index = _index(tmp_path / "index", backend)
    vectors = _vectors(50)
    index.add(whole.ids, (vectors[start : start + 7] for start in range(0, 50, 7)), whole.owners)
    index.save()
    assert len(list((tmp_path / "index").iterdir())) == 3
    assert index.search(_vectors(3, seed=9)) == whole.search(_vectors(3, seed=9))


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not an index: it holds no index.json"):
        open_index(tmp_path)
    _filled(tmp_path / "index")
    with pytest.raises(DataError, match=r"exists already\. Choose another folder"):
        _index(tmp_path / "index")
    matrix = next((tmp_path / "index").glob("*.npy"))
    data = matrix.read_bytes()
    matrix.write_bytes(data[:-8])
    with pytest.raises(DataError, match=rf"is damaged: {matrix.name} is not the matrix of 25 x 16 "):
        open_index(tmp_path / "index")
    matrix.unlink()
    with pytest.raises(
        DataError, match=rf"is damaged: {matrix.name} is missing\. Index the documents again\."
    ):
        open_index(tmp_path / "index")
    matrix.write_bytes(data)
    listed = matrix.with_suffix(".json")
    listed.write_text(json.dumps({"ids": [], "owners": []}))
    with pytest.raises(DataError, match=rf"is damaged: {listed.name} is not what was written"):
        open_index(tmp_path / "index")


def test_what_a_kill_left_is_in_nobodys_way(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("segment-0123.npy", ".segment-0123.json.x.part"):
        (folder / name).write_bytes(b"half")
    index = _filled(folder)
    assert len(list(folder.iterdir())) == 1 + 2 * 2
    (folder / "notes.txt").write_text("mine")
    index.remove(index.ids)
    index.save()
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "notes.txt"]


def test_two_writers_do_not_overwrite_each_other(tmp_path: Path) -> None:
    _filled(tmp_path / "index")
    first, second = open_index(tmp_path / "index"), open_index(tmp_path / "index")
    first.add(["x"], _vectors(1))
    first.save()
    second.add(["y"], _vectors(1))
    with pytest.raises(DataError, match=r"^Another process changed .*\. Nothing was written; do it again\.$"):
        second.save()
    assert open_index(tmp_path / "index").ids[-1] == "x"


def test_a_writer_whose_files_were_swept_away_names_none_of_them(tmp_path: Path) -> None:
    """What the other one wrote and took back again is what it was; the files of the addition under way are gone."""
    _filled(tmp_path / "index")
    slow, quick = open_index(tmp_path / "index"), open_index(tmp_path / "index")
    slow.add(["x"], _vectors(1))
    quick.add(["y"], _vectors(1))
    quick.save()
    quick.remove(["y"])
    quick.save()
    with pytest.raises(DataError) as caught:
        slow.save()
    assert str(caught.value) == (
        f"Another process changed {tmp_path / 'index'} meanwhile. Nothing was written; do it again."
    )
    assert len(open_index(tmp_path / "index").ids) == 50


def test_an_addition_that_fails_leaves_no_file(tmp_path: Path) -> None:
    index = _filled(tmp_path / "index")
    before = sorted(path.name for path in (tmp_path / "index").iterdir())
    with pytest.raises(DataError, match=r"has half of a surrogate pair\.$"):
        index.add(["\ud800"], _vectors(1))

    def swept() -> Any:
        yield _vectors(1)
        for path in (tmp_path / "index").glob("segment-*.npy"):
            if path.name not in before:
                path.unlink()

    with pytest.raises(DataError, match=r"^Another process changed .*\. Nothing was written; do it again\.$"):
        index.add(["x"], swept())
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == before


def test_a_backend_that_is_not_installed_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(CoterieError) as caught:
        create_index(tmp_path / "index", base=BASE, dimension=DIMENSION, backend="faiss")
    assert (
        str(caught.value) == "This index needs faiss, which is not installed: pip install 'coterie[faiss]'."
    )
    assert not (tmp_path / "index").exists()


def test_a_reader_goes_on_while_documents_are_removed(tmp_path: Path) -> None:
    _filled(tmp_path / "index")
    reader, writer = open_index(tmp_path / "index"), open_index(tmp_path / "index")
    before = reader.search(_vectors(3, seed=6))
    writer.remove(list(writer.ids)[:30])
    writer.save()
    assert reader.search(_vectors(3, seed=6)) == before


_WRITER = """
import sys
from pathlib import Path
import numpy as np
from pipelines.retrieval.index import create_index, open_index
folder = Path(sys.argv[1])
index = create_index(folder, base="a" * 64, dimension=16)
for number in range(10_000):
    index.add([f"{number:05}"], np.full((1, 16), number, dtype=np.float32))
    if number % 3 == 2:
        index.remove([f"{number - 1:05}"])
    index.save()
    print(number, flush=True)
"""


def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 50:
                break
        process.send_signal(signal.SIGKILL)
        acknowledged = int((process.stdout.read() or line).split()[-1])
    index = open_index(folder)
    expected = [
        f"{number:05}" for number in range(acknowledged + 1) if number % 3 != 1 or number == acknowledged
    ]
    also = [*expected, f"{acknowledged + 1:05}"]  # saved, but killed before it said so
    if (acknowledged + 1) % 3 == 2:
        also.remove(f"{acknowledged:05}")
    assert index.ids in (expected, also)
    index.add(["last"], _vectors(1))
    index.save()
    named = {f"{part.name}.{end}" for part in index.info.segments for end in ("npy", "json")}
    assert {path.name for path in folder.iterdir()} - {"index.json"} == named


def test_memory_is_the_mapping_alone(tmp_path: Path) -> None:
    index = _filled(tmp_path / "index")
    rows = index._segments[0].rows  # type: ignore[attr-defined]
    assert isinstance(rows, np.memmap)
    assert not rows.flags.writeable
    assert (
        sum(path.stat().st_size for path in (tmp_path / "index").glob("*.npy"))
        == 50 * DIMENSION * 4 + 2 * 128
    )
