"""Every hostile change to an admitted expert is refused, by name."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experts.admission import check_contents, check_expert, check_files
from experts.base import BaseDescription
from experts.card import BaseRef, ExpertCard
from experts.errors import AdmissionError, CardError, UnknownNameError
from experts.package import pack

Packed = tuple[Path, ExpertCard, BaseDescription]
Reseal = Callable[..., ExpertCard]
Tensors = dict[str, np.ndarray]

P = "base_model.model.model.layers"
UP_A = f"{P}.1.mlp.up_proj.lora_A.weight"
UP_B = f"{P}.1.mlp.up_proj.lora_B.weight"
SCHEMA = (
    "adapter_model.safetensors of expert 'acme/contracts' does not hold exactly the tensors that adapter_config.json "
    "gives on the base 'pico' (all of one dtype out of F32, BF16, F16):\n  - "
)
VALUES = "adapter_model.safetensors of expert 'acme/contracts' holds values that are not allowed:\n  - "


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


def with_value(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.copy()
    changed.flat[-1] = value
    return changed


def extra(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: zeros(*shape)}


def found(name: str, shape: str = "32, 32") -> str:
    return f"{SCHEMA}tensor '{name}': F32 ({shape}) found, not allowed here"


TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "lm_head": (
        extra("base_model.model.lm_head.weight", 64, 32),
        found("base_model.model.lm_head.weight", "64, 32"),
    ),
    "embed_tokens": (
        extra("base_model.model.model.embed_tokens.weight", 64, 32),
        found("base_model.model.model.embed_tokens.weight", "64, 32"),
    ),
    "k_proj": (
        extra(f"{P}.0.self_attn.k_proj.weight", 16, 32),
        found(f"{P}.0.self_attn.k_proj.weight", "16, 32"),
    ),
    "base layer": (
        extra(f"{P}.0.self_attn.q_proj.base_layer.weight", 32, 32),
        found(f"{P}.0.self_attn.q_proj.base_layer.weight"),
    ),
    "another layer": (
        extra(f"{P}.0.mlp.up_proj.lora_A.weight", 4, 32),
        found(f"{P}.0.mlp.up_proj.lora_A.weight", "4, 32"),
    ),
    "magnitude": (
        extra(f"{P}.1.mlp.up_proj.lora_magnitude_vector", 48),
        found(f"{P}.1.mlp.up_proj.lora_magnitude_vector", "48"),
    ),
    "missing": (
        lambda t: {name: a for name, a in t.items() if name != UP_A},
        f"{SCHEMA}tensor '{UP_A}': missing, F32 (4, 32) expected",
    ),
    "renamed": (
        lambda t: {name.replace("1.mlp.up_proj.lora_A", "1.mlp.up_prj.lora_A"): a for name, a in t.items()},
        f"{SCHEMA}tensor '{P}.1.mlp.up_prj.lora_A.weight': F32 (4, 32) found, not allowed here; did you mean "
        f"'{UP_A}'?\n  - tensor '{UP_A}': missing, F32 (4, 32) expected",
    ),
    "reshaped": (
        lambda t: t | {UP_A: zeros(32, 4), UP_B: zeros(48, 8)},
        f"{SCHEMA}tensor '{UP_A}': F32 (32, 4) found, F32 (4, 32) expected\n"
        f"  - tensor '{UP_B}': F32 (48, 8) found, F32 (48, 4) expected",
    ),
    "retyped": (
        lambda t: t | {UP_A: zeros(4, 32, dtype="float16")},
        f"{SCHEMA}tensor '{UP_A}': F16 (4, 32) found, F32 (4, 32) expected",
    ),
    "integers": (
        lambda t: t | {UP_A: zeros(4, 32, dtype="int32")},
        f"{SCHEMA}tensor '{UP_A}': I32 (4, 32) found, F32 (4, 32) expected",
    ),
    "NaN": (
        lambda t: t | {UP_A: with_value(t[UP_A], np.nan)},
        f"{VALUES}tensor '{UP_A}': 1 of 128 values are NaN or infinite; all must be finite",
    ),
    "infinite": (
        lambda t: t | {UP_A: with_value(t[UP_A], -np.inf), UP_B: zeros(48, 4) + np.inf},
        f"{VALUES}tensor '{UP_A}': 1 of 128 values are NaN or infinite; all must be finite\n"
        f"  - tensor '{UP_B}': 192 of 192 values are NaN or infinite; all must be finite",
    ),
    "huge value": (
        lambda t: t | {UP_A: with_value(t[UP_A], 2e4)},
        f"{VALUES}tensor '{UP_A}': largest magnitude 2e+04; at most 10000 is allowed",
    ),
    "large throughout": (
        lambda t: t | {UP_A: zeros(4, 32) + 200},
        f"{VALUES}tensor '{UP_A}': root mean square 200; at most 100 is allowed",
    ),
    "large update": (
        lambda t: t | {UP_A: zeros(4, 32) + 50, UP_B: zeros(48, 4) + 50},
        f"{VALUES}linear 'model.layers.1.mlp.up_proj': scaling * |B| * |A| / sqrt(in * out) is 2e+04; at most 100 "
        "is allowed",
    ),
}


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS)
def test_hostile_tensors(
    packed: Packed, reseal: Reseal, change: Callable[[Tensors], Tensors], message: str
) -> None:
    folder, card, base = packed
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    with pytest.raises(AdmissionError) as caught:
        check_expert(folder, reseal(folder, card), base)
    assert caught.value.exit_code == 2
    assert str(caught.value) == message


def test_retyped_throughout_is_another_expert(packed: Packed, reseal: Reseal) -> None:
    folder, card, base = packed
    path = folder / "adapter_model.safetensors"
    save_file({name: array.astype(np.float16) for name, array in load_file(path).items()}, path)
    assert check_expert(folder, reseal(folder, card), base).dtype == "F16"
    save_file({name: array.astype(np.float64) for name, array in load_file(path).items()}, path)
    with pytest.raises(AdmissionError) as caught:
        check_expert(folder, reseal(folder, card), base)
    assert len(caught.value.problems) == 8
    assert caught.value.problems[0] == (
        f"tensor '{P}.1.mlp.down_proj.lora_A.weight': F64 (4, 48) found, F32 (4, 48) expected"
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_not_finite_in_half_precision(packed: Packed, reseal: Reseal, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    folder, card, base = packed
    path = folder / "adapter_model.safetensors"
    tensors = {name: t.to(getattr(torch, dtype)) for name, t in load_torch(path).items()}
    save_torch(tensors, path)
    assert (
        check_expert(folder, reseal(folder, card), base).dtype
        == {"bfloat16": "BF16", "float16": "F16"}[dtype]
    )
    tensors[UP_A][0, 0] = float("nan")
    tensors[UP_A][3, 31] = float("-inf")
    tensors[UP_B][0, 0] = torch.finfo(tensors[UP_B].dtype).tiny / 2  # subnormal, hence finite
    save_torch(tensors, path)
    with pytest.raises(AdmissionError) as caught:
        check_expert(folder, reseal(folder, card), base)
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        f"{VALUES}tensor '{UP_A}': 2 of 128 values are NaN or infinite; all must be finite"
    )


def test_metadata_is_no_hiding_place(packed: Packed, reseal: Reseal) -> None:
    folder, card, base = packed
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "patient": "Jane"})
    with pytest.raises(AdmissionError) as caught:
        check_expert(folder, reseal(folder, card), base)
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        f"{SCHEMA}metadata: ['format', 'patient'] found, only 'format' is allowed; remove it"
    )


def test_duplicate_keys_in_the_header(packed: Packed, reseal: Reseal) -> None:
    folder, card, base = packed
    path = folder / "adapter_model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = json.dumps(header)[:-1] + f", {json.dumps(UP_A)}: {json.dumps(header[UP_A])}}}"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + raw[8 + length :])
    with pytest.raises(AdmissionError) as caught:
        check_expert(folder, reseal(folder, card), base)
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        "header of 'adapter_model.safetensors': duplicate keys; keep one of each:\n"
        f"  - key '{UP_A}' occurs 2 times"
    )


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "several": (
        {"r": 10**9, "use_dora": True, "nonsense": 1},
        "adapter_config.json is not allowed for a lora expert:\n"
        "  - r: 1000000000 found; allowed is a whole number from 1 to 4096\n"
        "  - use_dora: True found; allowed is false\n"
        "  - nonsense: unknown key",
    ),
    "another base": (
        {"base_model_name_or_path": "evil/base"},
        "The card of expert 'acme/contracts' does not say what its files say:\n"
        "  - base: the card says 'pico', adapter_config.json says 'evil/base'",
    ),
    "another alpha hides a large update": (
        {"lora_alpha": 1_000_000},
        f"{VALUES}linear",
    ),
}


@pytest.mark.parametrize(("changes", "message"), CONFIGS.values(), ids=CONFIGS)
def test_hostile_config(packed: Packed, reseal: Reseal, changes: dict[str, Any], message: str) -> None:
    folder, card, base = packed
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    started = time.process_time()
    with pytest.raises(AdmissionError) as caught:
        check_expert(folder, reseal(folder, card), base)
    assert time.process_time() - started < 1
    if message.endswith("linear"):
        assert str(caught.value).startswith(message)
        assert len(caught.value.problems) == 4
    else:
        assert caught.value.exit_code == 2
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[]", "adapter_config.json is not a JSON object."),
        (
            b'{"r": 1, "r": 2}',
            "adapter_config.json: duplicate keys; keep one of each:\n  - key 'r' occurs 2 times",
        ),
        (b"[" * 50_000, "adapter_config.json: nested more than 32 levels deep."),
    ],
)
def test_broken_config(packed: Packed, reseal: Reseal, text: bytes, message: str) -> None:
    folder, card, base = packed
    (folder / "adapter_config.json").write_bytes(text)
    with pytest.raises(AdmissionError) as caught:
        check_expert(folder, reseal(folder, card), base)
    assert caught.value.exit_code == 2
    assert str(caught.value) == message


def test_summary(packed: Packed) -> None:
    folder, card, base = packed
    summary = check_expert(folder, card, base)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert summary.parameters == sum(array.size for array in tensors.values()) == 2 * 4 * 2 * (32 + 48)
    assert summary.bytes == sum(entry.size for entry in card.files)
    assert (summary.kind, summary.layers, summary.rank) == ("lora", (1, 2), 4)
    assert (summary.dtype, summary.ffn_only) == ("F32", True)


def test_another_anchor_with_equal_shapes(packed: Packed, base: Callable[..., BaseDescription]) -> None:
    folder, card, mine = packed
    other = base(seed=1)
    assert {n: s.shape for n, s in other.tensors.items()} == {n: s.shape for n, s in mine.tensors.items()}
    with pytest.raises(AdmissionError) as caught:
        check_expert(folder, card, other)
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        f"Expert 'acme/contracts' was trained on the base 'pico' with fingerprint {mine.fingerprint}; the base at "
        f"hand has fingerprint {other.fingerprint}. Equal shapes are not enough: train the expert on this base, or "
        "use the one it was trained on."
    )


def test_card_that_claims_otherwise(packed: Packed, reseal: Reseal) -> None:
    folder, card, base = packed
    with pytest.raises(AdmissionError) as caught:
        check_expert(folder, reseal(folder, card, layers=[0, 1], rank=8), base)
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        "The card of expert 'acme/contracts' does not say what its files say:\n"
        "  - layers: the card says [0, 1], the files say [1, 2]\n"
        "  - rank: the card says 8, the files say 4"
    )


def test_unknown_licence_and_kind(packed: Packed, reseal: Reseal) -> None:
    folder, card, base = packed
    with pytest.raises(CardError) as caught:
        check_expert(folder, reseal(folder, card, license="Apache-2"), base)
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        "'Apache-2' is not an SPDX licence expression; write for instance 'Apache-2.0' or, for terms of your own, "
        "'LicenseRef-<name>'.\n  - unknown licence 'Apache-2'; did you mean 'Apache-2.0'?"
    )
    with pytest.raises(UnknownNameError) as unknown:
        check_expert(folder, reseal(folder, card, kind="loraa"), base)
    assert (
        str(unknown.value)
        == "Unknown expert kind 'loraa'. Did you mean 'lora'? Known: dense, ffn, lora, retriever."
    )


FOLDER = "The folder of expert 'acme/contracts' is not as packed:\n  - "


def swap(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: array + 1 for name, array in load_file(path).items()}, path, metadata={"format": "pt"})


def symlink(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def fifo(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")


def nested(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "x.py").write_text("print()")


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "symlink": (symlink, "adapter_model.safetensors: a symbolic link; a regular file is needed"),
    "fifo": (fifo, "adapter_model.safetensors: a FIFO; a regular file is needed"),
    "hard link": (
        lambda f: os.link(f / "adapter_model.safetensors", f.parent / "second"),
        "adapter_model.safetensors: has 2 hard links; copy the file, so that nothing else can change it",
    ),
    "pickle": (
        lambda f: (f / "pytorch_model.bin").write_bytes(b"x"),
        "pytorch_model.bin: a regular file that the card does not list; remove it",
    ),
    "torch file": (
        lambda f: (f / "x.pt").write_bytes(b"x"),
        "x.pt: a regular file that the card does not list; remove it",
    ),
    "git": (nested, ".git/x.py: a regular file that the card does not list; remove it"),
    "empty folder": (
        lambda f: (f / "sub").mkdir(),
        "sub: a folder that the card does not list; remove it",
    ),
    "linked folder": (
        lambda f: (f / "sub").symlink_to("/"),
        "sub: a symbolic link that the card does not list; remove it",
    ),
    "longer": (
        lambda f: os.truncate(f / "adapter_model.safetensors", 6113),
        "adapter_model.safetensors: 6,113 bytes, the card declares 6,112",
    ),
    "missing": (
        lambda f: (f / "adapter_config.json").unlink(),
        "adapter_config.json: missing from the folder",
    ),
    "no card": (lambda f: (f / "card.json").unlink(), "card.json: missing from the folder"),
    "several": (
        lambda f: ((f / "adapter_config.json").unlink(), (f / "a.pkl").touch(), symlink(f)),
        "adapter_config.json: missing from the folder\n"
        "  - a.pkl: a regular file that the card does not list; remove it\n"
        "  - adapter_model.safetensors: a symbolic link; a regular file is needed",
    ),
}


@pytest.mark.parametrize(("change", "problem"), FOLDERS.values(), ids=FOLDERS)
def test_hostile_folder(packed: Packed, change: Callable[[Path], object], problem: str) -> None:
    folder, card, base = packed
    change(folder)
    with pytest.raises(AdmissionError) as caught:
        check_expert(folder, card, base)
    assert caught.value.exit_code == 2
    assert str(caught.value) == FOLDER + problem


def test_swapped_after_packing(packed: Packed) -> None:
    folder, card, _ = packed
    declared = {entry.path: entry.sha256 for entry in card.files}["adapter_model.safetensors"]
    swap(folder)
    digest = sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    with pytest.raises(AdmissionError) as caught:
        check_files(folder, card)
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        f"{FOLDER}adapter_model.safetensors: sha256 is {digest}, the card declares {declared}"
    )


def test_other_card_in_the_folder(packed: Packed, reseal: Reseal) -> None:
    folder, card, _ = packed
    reseal(folder, card, domain="medicine")
    with pytest.raises(AdmissionError) as caught:
        check_files(folder, card)
    assert caught.value.exit_code == 2
    assert str(caught.value) == f"{FOLDER}card.json: not the card with sha256 {card.digest}"


def test_file_that_is_not_of_the_kind(packed: Packed, reseal: Reseal) -> None:
    folder, card, _ = packed
    (folder / "handler.py").write_text("print()")
    with pytest.raises(AdmissionError) as caught:
        check_files(folder, reseal(folder, card))
    assert caught.value.exit_code == 2
    assert str(caught.value) == f"{FOLDER}handler.py: not a file of a lora expert"


def test_too_many_files(packed: Packed) -> None:
    folder, card, _ = packed
    for number in range(1001):
        (folder / f"{number}.txt").touch()
    with pytest.raises(AdmissionError) as caught:
        check_files(folder, card)
    assert caught.value.exit_code == 2
    assert str(caught.value) == f"'{folder}' holds more than 1000 files; an expert has fewer than ten."


def test_every_flipped_bit_is_refused(packed: Packed) -> None:
    folder, card, base = packed
    refused = 0
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for bit in range(0, len(data) * 8, max(1, len(data) * 8 // 150)):
            mutant = bytearray(data)
            mutant[bit // 8] ^= 1 << bit % 8
            path.write_bytes(mutant)
            with pytest.raises(AdmissionError):
                check_files(folder, card)
            refused += 1
        path.write_bytes(data)
    assert refused >= 450
    check_expert(folder, card, base)


def test_contents_may_lie_anywhere(packed: Packed, tmp_path: Path) -> None:
    # the registry keeps files under their digests
    folder, card, base = packed
    files = {}
    for entry in card.files:
        files[entry.path] = (folder / entry.path).rename(tmp_path / entry.sha256)
    assert check_contents(files, card, base).parameters == 1280


def test_values_can_be_left_out(packed: Packed, reseal: Reseal) -> None:
    folder, card, base = packed
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {UP_A: zeros(4, 32) + np.nan}, path)
    card = reseal(folder, card)
    files = {entry.path: folder / entry.path for entry in card.files}
    assert check_contents(files, card, base, values=False).rank == 4
    with pytest.raises(AdmissionError, match="128 of 128 values are NaN"):
        check_contents(files, card, base)


@pytest.mark.parametrize(
    ("family", "targets", "ffn_only"),
    [
        ("qwen3", ["gate_proj", "up_proj", "down_proj"], True),
        ("olmo2", ["gate_proj", "q_proj"], False),
        ("gemma3_text", ["down_proj"], True),
        ("gpt_neox", ["dense_h_to_4h", "dense_4h_to_h"], True),
        ("phi3", ["gate_up_proj", "down_proj"], True),
    ],
)
def test_adapters_of_every_family_are_admitted(
    family: str,
    targets: list[str],
    ffn_only: bool,
    tmp_path: Path,
    adapter: Callable[..., Path],
    base: Callable[..., BaseDescription],
    ref: Callable[[BaseDescription], BaseRef],
) -> None:
    raw = adapter(family, target_modules=targets)
    names = {"name": "acme/x", "version": 1, "domain": "law", "license": "MIT"}
    card = pack(raw, tmp_path / "e", **names, base=base(family), base_ref=ref(base(family)))
    assert check_expert(tmp_path / "e", card, base(family)).ffn_only is ffn_only
