"""The index kept by faiss against the default one, and against sums of fractions, where scores tie or nearly do."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.retrieval.index import Index, create_index, open_index

faiss = pytest.importorskip("faiss")


def _index(folder: Path, ids: list[str], rows: Any, backend: str = "faiss") -> Index:
    index = create_index(folder, base="a" * 64, dimension=rows.shape[1], backend=backend)
    index.add(ids, rows)
    index.save()
    return open_index(folder)


@pytest.mark.parametrize("count", [5, 20, 1000])
@pytest.mark.parametrize("backend", ["exact", "faiss"])
def test_the_first_ids_win_where_scores_tie_at_the_last_place(
    tmp_path: Path, backend: str, count: int
) -> None:
    vector = np.random.default_rng(0).standard_normal((1, 48)).astype(np.float32)
    rows = np.repeat(vector, count, axis=0)
    ids = [f"d{row:04}" for row in range(count)]
    for name, order in (("up", ids), ("down", ids[::-1]), ("mixed", ids[1::2] + ids[::2])):
        index = _index(tmp_path / name, order, rows, backend)
        assert [hit.id for hit in index.search(vector, k=3)[0]] == ids[:3]
        allow = np.array([key not in ids[:2] for key in order])
        assert [hit.id for hit in index.search(vector, k=3, allow=allow)[0]] == ids[2:5]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_both_backends_find_the_same(data: st.DataObject) -> None:
    """Bit for bit, with few distinct scores, masks, and rows that were removed again."""
    count = data.draw(st.integers(1, 60))
    values = data.draw(st.lists(st.integers(-2, 2), min_size=count * 3, max_size=count * 3))
    rows = np.array(values, dtype=np.float32).reshape(count, 3) * np.float32(0.1)
    asked = data.draw(st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=1, max_size=5))
    queries = np.array(asked, dtype=np.float32) / 7
    ids = list(map(str, data.draw(st.permutations(range(count)))))
    gone = data.draw(st.sets(st.sampled_from(ids), max_size=3))
    allow = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))[len(gone) :]
    k = data.draw(st.integers(1, 20))
    with TemporaryDirectory() as folder:
        found = []
        for backend in ("exact", "faiss"):
            index = _index(Path(folder) / backend, ids, rows, backend)
            index.remove(gone)
            found.append([index.search(queries, k=k), index.search(queries, k=k, allow=allow)])
    assert found[0] == found[1]
    assert len(found[1][1][0]) == min(k, int(allow.sum()))


def test_what_float32_rounds_alike_or_turns_round_is_ranked(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    values = generator.uniform(0.5, 1, 64)
    rows = np.array([generator.permutation(values) for _ in range(400)])
    rows = (rows * (1 + 1e-8 * generator.standard_normal((400, 1)))).astype(np.float32)
    exact = [sum(map(Fraction, row.tolist()), Fraction()) for row in rows]
    ids = [f"{row:03}" for row in range(400)]
    query = np.ones((1, 64), dtype=np.float32)
    best = sorted(range(400), key=lambda row: (-exact[row], row))
    in_float32 = sorted(range(400), key=lambda row: (-float(rows[row] @ query[0]), row))
    assert best[:10] != in_float32[:10]  # the control: such products cannot tell
    index = _index(tmp_path / "index", ids, rows)
    for k in (1, 10, 100):
        assert [int(hit.id) for hit in index.search(query, k=k)[0]] == best[:k]


def test_a_query_is_answered_alike_alone_and_among_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faiss.cvar, "distance_compute_blas_threshold", 1)  # another product for many queries
    generator = np.random.default_rng(5)
    rows, queries = (generator.standard_normal((count, 33)).astype(np.float32) for count in (2000, 64))
    index = _index(tmp_path / "index", [f"{row:04}" for row in range(2000)], rows)
    together = index.search(queries, k=10)
    assert together == [index.search(query[None], k=10)[0] for query in queries]
