"""Windows of token ids: what is in them, what is not, and that a seed fixes them."""

from __future__ import annotations

import os

import pytest

from experts.errors import DataError
from pipelines.train.windows import make_windows, read_documents, split_held_out

END = 256


def _text(row) -> str:
    return bytes(int(i) for i in row if i != END).decode()


@pytest.fixture(scope="module")
def documents():
    return [f"document {n}: " + " ".join(f"w{n}x{i}" for i in range(5 + 13 * (n % 4))) for n in range(30)]


def test_small_text_is_used_whole(byte_tokenizer, documents):
    length = 16
    windows = make_windows(documents, byte_tokenizer, sequence_length=length, limit=10_000, seed=0)
    tokens = sum(len(text.encode()) + 1 for text in documents)
    assert len(windows) == tokens // length
    assert windows.documents == len(documents)
    assert int((windows.ids == END).sum()) in (len(documents), len(documents) - 1)  # the last may be cut off


def test_long_excerpts_have_windows_of_their_own(byte_tokenizer):
    documents = [chr(ord("a") + n) * 4000 for n in range(6)]
    windows = make_windows(documents, byte_tokenizer, sequence_length=100, limit=200, seed=3)
    assert len(windows) == 200
    assert all(len(set(row.tolist()) - {END}) == 1 for row in windows.ids)
    assert windows.documents == 6


def test_the_seed_fixes_the_windows(byte_tokenizer, documents):
    def digest(seed):
        return make_windows(documents, byte_tokenizer, sequence_length=16, limit=9, seed=seed).digest()

    assert digest(0) == digest(0)
    assert digest(0) != digest(1)


def test_a_tokenizer_that_starts_with_bos_keeps_it_in_every_window(byte_tokenizer, documents):
    class WithStart:
        bos_token_id, eos_token_id = 257, END

        def __call__(self, texts, add_special_tokens=True, **_):
            if isinstance(texts, str):
                return {"input_ids": [257, *texts.encode()] if add_special_tokens else [*texts.encode()]}
            return {"input_ids": [[*text.encode()] for text in texts]}

    windows = make_windows(documents, WithStart(), sequence_length=16, limit=5, seed=0)
    assert (windows.ids[:, 0] == 257).all()
    assert not (windows.ids[:, 1:] == 257).any()


def test_too_little_text(byte_tokenizer):
    with pytest.raises(DataError) as caught:
        make_windows(["ab"], byte_tokenizer, sequence_length=16, limit=5, seed=0, what="the training text")
    assert str(caught.value) == (
        "the training text does not fill one window of 16 tokens. Give more text or a smaller sequence_length."
    )


def test_held_out_documents_stay_where_they_are():
    documents = [f"text {n}" for n in range(200)]
    training, held_out = split_held_out(documents, fraction=0.2)
    assert 20 <= len(held_out) <= 60
    assert sorted(training + held_out) == sorted(documents)
    more, held_out_of_more = split_held_out([*documents, "one more", documents[0]], fraction=0.2)
    assert set(held_out) <= set(held_out_of_more)
    assert set(training) <= set(more)


def test_held_out_leaves_no_side_empty():
    assert split_held_out(["a", "b"], fraction=1e-9)[1] != []
    assert split_held_out(["a", "b"], fraction=0.5)[0] != []
    assert split_held_out(["a"], fraction=0.5) == (["a"], [])
    assert split_held_out(["a", "b"], fraction=0.0) == (["a", "b"], [])


def test_reading_both_formats(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "more": 1}\n{"text": "  "}\n')
    (tmp_path / "b.txt").write_text("three\nlines")
    assert read_documents([tmp_path / "a.jsonl", tmp_path / "b.txt"]) == ["one", "two", "three\nlines"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "secret"}\nsecret\n', "a.jsonl, line 2: not JSON. Write one object a line."),
        (
            "a.jsonl",
            b'{"txt": "secret"}\n',
            'a.jsonl, line 1: no string under "text". Write {"text": "..."} on every line.',
        ),
        ("a.txt", b"secret \xff", "a.txt is not UTF-8 (byte 7). Convert it first."),
        ("a.txt", b" \n", "No text in a.txt."),
    ],
)
def test_text_that_cannot_be_used_is_named_but_not_quoted(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_documents([tmp_path / name])
    assert str(caught.value) == message


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError) as caught:
        read_documents([tmp_path / "gone.txt"])
    assert str(caught.value) == "gone.txt cannot be read: No such file or directory."


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "law.jsonl")
    with pytest.raises(DataError) as caught:
        read_documents([tmp_path / "law.jsonl"])
    assert str(caught.value) == "law.jsonl is not a regular file. Write the text to a file first."
    assert caught.value.exit_code == 2
