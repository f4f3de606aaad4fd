"""Properties of routed retrieval that a change of code must not lose: here, and where they are tested elsewhere.

====  ====================================================================  ============================================
R1    documents are the base's bits, whatever experts, sets and training    test_encode, test_folder, test_full_encoder;
                                                                            train/test_retriever
R2    left out in a request == built without, bit for bit; all out == base  test_optout, test_descent, test_full_encoder
R3    taken out, never in, turned round, put in again: equal bytes          test_folder, test_router, test_full_encoder;
                                                                            train/test_retrieval_scores
R4    no byte of an owner is left                                           test_folder, test_full_encoder
R5    a left-out expert's file may be missing; it is never evaluated        test_optout, test_full_encoder
R6    a request widens only; unknown owners, stock models: errors           test_optout
R7    rows with sets of their own == each alone                             test_optout, test_full_encoder
R8    queries differ from documents after saving and loading                test_folder
R9    the mean over pilots == one product an expert                         test_router
R10   ranking by fused scores == by the fused vector                        test_encode
R11   the order of experts changes no route                                 test_router, test_labelling
R12   train, label and test queries are disjoint                            train/test_retriever,
                                                                            train/test_retrieval_scores
R13   slot 0 == base; mixed == separate, bit for bit                        test_stacked
R14   threads with different experts: no wrong row (control: PEFT)          test_stacked, test_full_encoder
R15   one pass: the state is the base's, routes == two passes', counted     test_encode
R16   training runs no document encoder and changes adapters only           train/test_retriever
R17   harmful experts are not asked                                         test_router
R18   confidence is monotone and leaves the choice alone                    test_router
R19   nDCG, recall, MRR == trec_eval's, graded and tied                     retrieval/test_metrics
R20   another base, byte, pooling, similarity or longest input: refused     here; experts/test_retriever,
                                                                            retrieval/test_index, test_full_encoder
R21   small groups are absent; an owner's text is in nobody's files         here; test_manifest, train/test_retriever,
                                                                            experts/test_retrieval_artifacts
R22   MTEB without a network; an identity for each composition              integrations/test_mteb
R23   LangChain, LlamaIndex, Haystack == encode_query, encode_document      integrations/test_frameworks
R24   a cache is hit by equal text, set and composition only                test_cache
R25   saved, loaded, saved: identical files                                 test_folder
====  ====================================================================  ============================================

Not applicable: the part of R8 about an input module of our own (such a folder asks for ``trust_remote_code``, so none
is written), and the bits of R13 for whole query encoders: each runs its rows in a batch of their own, and sums over
batches of another size may differ in the last bit (R7's tolerance holds, R2 is exact).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from experts.errors import AdmissionError
from registry import Registry

TESTS = Path(__file__).parent.parent


def test_every_row_names_tests_that_are_there() -> None:
    """A file that a row names has a test with the row's number, or is one of those that do not number theirs."""
    assert __doc__ is not None
    rows: dict[str, list[str]] = {}
    for line in __doc__.splitlines():
        match = re.match(r"(R\d+|   ) +.*?((?:here; )?(?:\w+/)?test_\w+.*|here.*)$", line)
        if match:
            number = match[1].strip() or next(reversed(rows))
            rows.setdefault(number, []).extend(re.findall(r"(?:\w+/)?test_\w+", match[2]))
    assert list(rows) == [f"R{number}" for number in range(1, 26)]
    for number, names in rows.items():
        for name in names:
            path = TESTS / (f"{name}.py" if "/" in name else f"retriever/{name}.py")
            assert path.is_file(), (number, name)
            if path.parent.name == "retriever" and path.stem not in ("test_full_encoder", "test_folder"):
                assert f"{number.lower()}_" in path.read_text(), (number, name)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"max_seq_length": 32}, "max_seq_length: 64 in the card, 32 in the base at hand"),
        ({"pooling": "cls"}, "pooling: 'mean' in the card, 'cls' in the base at hand"),
    ],
)
def test_r20_a_base_that_reads_less_or_pools_otherwise(
    pico: Any, settings: dict[str, Any], problem: str
) -> None:
    """Its tensors are the same; an adapter and a whole encoder for the other one are refused alike."""
    registry = Registry(pico.scratch("registry"))
    registry.add_base(pico.embedder(**settings), name="embedder")
    package = pico.pack_retriever(pico.write_retriever(pico.scratch("raw"), seed=1), name="acme/search")
    with pytest.raises(AdmissionError) as caught:
        registry.register(package)
    assert caught.value.problems == (problem,)


def test_r21_an_owners_text_is_in_no_file_of_the_composition(retrievers: Any, pico: Any) -> None:
    """The texts behind the published sums, as text in two encodings and as token ids in two widths."""
    import numpy as np

    folder = retrievers.folder()
    tokenizer = retrievers.stock().tokenizer
    wanted: list[bytes] = []
    for seed in (1, 2, 3):
        for text in pico.domain_texts(seed, count=3):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            wanted += [text.encode(), text.encode("utf-16-le")]
            wanted += [np.array(ids, dtype=kind).tobytes() for kind in ("<i4", "<i8")]

    def found(data: bytes) -> int:
        return sum(piece in data for piece in wanted)

    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if found(path.read_bytes())] == []
    assert found(b"..." + b"...".join(wanted)) == len(wanted)  # the control
