from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save, save_file

from experts.errors import AdmissionError
from experts.safetensors_header import read_header

Write = Callable[..., None]


def entry(dtype: str = "F32", shape: object = (2,), start: int = 0, end: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BAD = "'f.safetensors' is not a well-formed safetensors file:\n  - "
BAD_NAME = "not a tensor name; letters, digits, '_', '-' and single dots are allowed, at most 255 characters"
BAD_ENTRY = "its entry must have exactly the keys data_offsets, dtype, shape"
BAD_SHAPE = "is not a list of at most 8 whole numbers"
BAD_METADATA = "Metadata in the header of 'f.safetensors' is not a mapping of strings to strings."
REFUSED: dict[str, tuple[bytes | dict[str, Any], int, str]] = {
    "parent name": ({"../a": entry()}, 8, f"{BAD}tensor '../a': {BAD_NAME}"),
    "two dots": ({"a..b": entry()}, 8, f"{BAD}tensor 'a..b': {BAD_NAME}"),
    "NUL name": ({"a\0b": entry()}, 8, f"{BAD}tensor 'a\\x00b': {BAD_NAME}"),
    "slash name": ({"/etc": entry()}, 8, f"{BAD}tensor '/etc': {BAD_NAME}"),
    "empty name": ({"": entry()}, 8, f"{BAD}tensor '': {BAD_NAME}"),
    "long name": ({"a" * 256: entry()}, 8, f"{BAD}tensor '{'a' * 256}': {BAD_NAME}"),
    "unicode name": ({"ä": entry()}, 8, f"{BAD}tensor 'ä': {BAD_NAME}"),
    "dtype": (
        {"a": entry("F4")},
        8,
        f"{BAD}tensor 'a': dtype 'F4' is not one of BOOL, U8, I8, F8_E4M3, F8_E5M2, U16, I16, F16, BF16, U32, "
        "I32, F32, U64, I64, F64",
    ),
    "keys": ({"a": {"dtype": "F32"}}, 0, f"{BAD}tensor 'a': {BAD_ENTRY}"),
    "extra key": ({"a": entry() | {"x": 1}}, 8, f"{BAD}tensor 'a': {BAD_ENTRY}"),
    "negative": ({"a": entry(shape=[-2])}, 8, f"{BAD}tensor 'a': shape [-2] {BAD_SHAPE}"),
    "float shape": ({"a": entry(shape=[2.0])}, 8, f"{BAD}tensor 'a': shape [2.0] {BAD_SHAPE}"),
    "bool shape": ({"a": entry(shape=[True])}, 8, f"{BAD}tensor 'a': shape [True] {BAD_SHAPE}"),
    "nine dimensions": (
        {"a": entry(shape=[1] * 9)},
        8,
        f"{BAD}tensor 'a': shape [1, 1, 1, 1, 1, 1, 1, 1, 1] {BAD_SHAPE}",
    ),
    "overflow": (
        {"a": entry(shape=[1 << 40, 1 << 40], end=0)},
        0,
        f"{BAD}tensor 'a': 0 bytes for shape (1099511627776, 1099511627776) of F32, which takes "
        "4,835,703,278,458,516,698,824,704 bytes",
    ),
    "no elements": (
        {"a": entry(shape=[0, 3], end=0)},
        0,
        f"{BAD}tensor 'a': shape (0, 3) has no elements; leave the tensor out",
    ),
    "offsets": (
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}},
        8,
        f"{BAD}tensor 'a': data_offsets [8] are not two whole numbers",
    ),
    "backwards": (
        {"a": entry(start=8, end=0)},
        8,
        f"{BAD}tensor 'a': -8 bytes for shape (2,) of F32, which takes 8 bytes",
    ),
    "short": ({"a": entry(end=4)}, 4, f"{BAD}tensor 'a': 4 bytes for shape (2,) of F32, which takes 8 bytes"),
    "several": (
        {"../a": entry(), "b": entry("F4"), "c": entry(shape=[0], end=0)},
        8,
        f"{BAD}tensor '../a': {BAD_NAME}\n  - tensor 'b': dtype 'F4' is not one of BOOL, U8, I8, F8_E4M3, F8_E5M2, "
        "U16, I16, F16, BF16, U32, I32, F32, U64, I64, F64\n  - tensor 'c': shape (0,) has no elements; leave the "
        "tensor out",
    ),
    "duplicate": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        8,
        "header of 'f.safetensors': duplicate keys; keep one of each:\n  - key 'a' occurs 2 times",
    ),
    "list": (b"[1]", 0, "Header of 'f.safetensors' is not a JSON object; write the file with safetensors."),
    "metadata list": ({"__metadata__": [1]}, 0, BAD_METADATA),
    "metadata number": ({"__metadata__": {"a": 1}}, 0, BAD_METADATA),
    "nested": (
        b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
        0,
        "header of 'f.safetensors': nested more than 4 levels deep.",
    ),
    "syntax": (
        b"{x}",
        0,
        "header of 'f.safetensors', line 1, column 2: not valid JSON: Expecting property "
        "name enclosed in double quotes.",
    ),
}


@pytest.mark.parametrize(("header", "body", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path: Path, write_raw: Write, header: bytes, body: int, message: str) -> None:
    path = tmp_path / "f.safetensors"
    write_raw(path, header, b"\0" * body)
    with pytest.raises(AdmissionError) as caught:
        read_header(path)
    assert str(caught.value) == message


LAYOUTS = {
    "overlap": ((4, 12), 12, "tensor 'b': overlaps the tensor before it (starts at byte {4}, not {8})"),
    "hole": ((9, 17), 17, "tensor 'b': leaves a hole before it (starts at byte {9}, not {8})"),
    "trailing": ((8, 16), 17, "the tensors end at byte {16}, the file at byte {17}"),
    "truncated": ((8, 16), 15, "the tensors end at byte {16}, the file at byte {15}"),
}


@pytest.mark.parametrize(("offsets", "body", "problem"), LAYOUTS.values(), ids=LAYOUTS)
def test_layout_of_bytes(
    tmp_path: Path, write_raw: Write, offsets: tuple[int, int], body: int, problem: str
) -> None:
    path = tmp_path / "f.safetensors"
    header = {"a": entry(), "b": entry(start=offsets[0], end=offsets[1])}
    write_raw(path, header, b"\0" * body)
    with pytest.raises(AdmissionError) as caught:
        read_header(path)
    first = 8 + len(json.dumps(header))
    positions = [first + n for n in range(20)]
    assert str(caught.value) == BAD + problem.format(*positions)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (1 << 63, "declares a header of 9,223,372,036,854,775,808 bytes; at most 1,048,576 are allowed."),
        ((1 << 20) + 1, "declares a header of 1,048,577 bytes; at most 1,048,576 are allowed."),
        (100, "declares a header of 100 bytes but holds 10 bytes in all."),
    ],
)
def test_declared_length(tmp_path: Path, write_raw: Write, length: int, message: str) -> None:
    path = tmp_path / "f.safetensors"
    write_raw(path, b"{}", length=length)
    with pytest.raises(AdmissionError) as caught:
        read_header(path)
    assert str(caught.value) == f"'f.safetensors' {message}"


def test_too_short(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(b"1234567")
    with pytest.raises(AdmissionError) as caught:
        read_header(path)
    assert (
        str(caught.value)
        == "'f.safetensors' holds 7 bytes; a safetensors file starts with 8 bytes of length."
    )


def test_hundred_thousand_empty_tensors(tmp_path: Path, write_raw: Write) -> None:
    path = tmp_path / "f.safetensors"
    empty = ",".join(f'"t{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(100_000))
    write_raw(path, f"{{{empty}}}".encode())
    started = time.process_time()
    with pytest.raises(AdmissionError) as caught:
        read_header(path)
    assert time.process_time() - started < 0.5
    size = path.stat().st_size - 8
    assert str(caught.value) == (
        f"'f.safetensors' declares a header of {size:,} bytes; at most 1,048,576 are allowed."
    )
    with pytest.raises(AdmissionError) as caught:
        read_header(path, max_header=16 << 20)
    message = "'f.safetensors' lists more than 8,192 tensors; at most that many are allowed."
    assert str(caught.value) == message
    # a key spelled with an escape is counted too, after parsing
    escaped = ",".join(f'"t{n}":{{"d\\u0074ype":"F32"}}' for n in range(9_000))
    write_raw(path, f"{{{escaped}}}".encode())
    with pytest.raises(AdmissionError) as caught:
        read_header(path)
    assert str(caught.value) == message


def test_huge_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 1 << 32))
        stream.truncate(1 << 33)  # sparse
    tracemalloc.start()
    with pytest.raises(AdmissionError):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_special_files(tmp_path: Path) -> None:
    real, link, fifo = tmp_path / "real", tmp_path / "link", tmp_path / "fifo"
    save_file({"a": np.zeros(2, np.float32)}, real)
    link.symlink_to(real)
    os.mkfifo(fifo)
    with pytest.raises(AdmissionError) as caught:
        read_header(link)
    assert str(caught.value) == f"'{link}' is a symbolic link; put the file itself there."
    assert set(read_header(link, follow_symlinks=True).tensors) == {"a"}
    with pytest.raises(AdmissionError) as caught:
        read_header(fifo)
    assert str(caught.value) == f"'{fifo}' is a FIFO; a regular file is needed."
    with pytest.raises(AdmissionError) as caught:
        read_header(tmp_path / "no\0ne")
    assert "cannot be opened: embedded null byte." in str(caught.value)


def test_agrees_with_the_library(tmp_path: Path, base_folder: Callable[..., Path]) -> None:
    path = base_folder("gpt_neox") / "model.safetensors"
    header = read_header(path)
    raw = path.read_bytes()
    with safe_open(path, "np") as file:
        assert set(header.tensors) == set(file.keys())
        assert header.metadata == file.metadata()
        for name, tensor in header.tensors.items():
            array = file.get_tensor(name)
            assert tensor.shape == array.shape
            assert tensor.dtype == "F32"
            assert (tensor.numel, tensor.nbytes) == (array.size, array.nbytes)
            assert raw[tensor.start : tensor.end] == array.tobytes()


_GOOD = save(
    {"a.weight": np.ones((2, 3), np.float32), "b.weight": np.ones((4,), np.float16)},
    metadata={"format": "pt"},
)


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(st.data())
def test_mutants_give_typed_errors_only(tmp_path: Path, data: st.DataObject) -> None:
    mutant = bytearray(_GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutant) - 1))
        match data.draw(st.sampled_from(["flip", "insert", "delete", "digit", "truncate"])):
            case "flip":
                mutant[at] ^= 1 << data.draw(st.integers(0, 7))
            case "insert":
                mutant[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case "delete":
                del mutant[at : at + data.draw(st.integers(1, 8))]
            case "digit":
                mutant[at] = data.draw(st.sampled_from(b'0123456789"[]{},:-e.'))
            case "truncate":
                del mutant[at:]
        if not mutant:
            break
    path = tmp_path / "mutant.safetensors"
    path.write_bytes(mutant)
    try:
        header = read_header(path)
    except AdmissionError:
        return
    # what we accept, the library accepts too, with the same contents
    with safe_open(path, "np") as file:
        assert set(file.keys()) == set(header.tensors)
        for name, tensor in header.tensors.items():
            assert tuple(file.get_slice(name).get_shape()) == tensor.shape
