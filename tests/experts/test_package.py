from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import experts.package
from experts.admission import check_expert
from experts.base import BaseDescription
from experts.card import BaseRef, ExpertCard, Terms, TrainingInfo
from experts.errors import AdmissionError, CardError, UnknownNameError
from experts.package import pack, read_package
from experts.routing_artifacts import RoutingArtifacts, RoutingInfo, RowsInfo, Statistics, StatisticsInfo

Base = Callable[..., BaseDescription]
Ref = Callable[[BaseDescription], BaseRef]
NAMES: dict[str, Any] = {"name": "acme/contracts", "version": 1, "domain": "law", "license": "Apache-2.0"}


@pytest.fixture(scope="module")
def source(adapter: Callable[..., Path]) -> Path:
    return adapter(target_modules=["up_proj", "down_proj"], layers_to_transform=[1, 2])


@pytest.fixture
def raw(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "raw"))


@pytest.fixture
def do_pack(tmp_path: Path, base: Base, ref: Ref) -> Callable[..., ExpertCard]:
    def run(folder: Path, **options: Any) -> ExpertCard:
        staging = options.pop("staging", tmp_path / "out")
        return pack(folder, staging, **{**NAMES, "base": base(), "base_ref": ref(base()), **options})

    return run


def ffn_folder(folder: Path, base_folder: Path, held: list[int], **config: Any) -> Path:
    folder.mkdir()
    tensors = load_file(base_folder / "model.safetensors")
    kept = {n: a for n, a in tensors.items() if any(f".layers.{k}.mlp." in n for k in held)}
    save_file(kept, folder / "ffn.safetensors")
    (folder / "config.json").write_text(json.dumps({"format_version": 1, "layers": held} | config))
    return folder


def test_adapter_is_packed_unchanged_but_for_the_base(
    raw: Path, tmp_path: Path, do_pack: Callable[..., ExpertCard], ref: Ref, base: Base
) -> None:
    secret = str(tmp_path / "secret" / "checkpoint")
    config_path = raw / "adapter_config.json"
    config = json.loads(config_path.read_text()) | {"base_model_name_or_path": secret, "revision": "local"}
    config_path.write_text(json.dumps(config))
    card = do_pack(raw)
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "card.json",
    ]
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (raw / weights).read_bytes()
    written = json.loads((out / "adapter_config.json").read_text())
    assert written == config | {"base_model_name_or_path": "pico", "revision": None}
    assert list(written) == list(config)
    assert all(secret.encode() not in path.read_bytes() for path in out.iterdir())
    assert read_package(out) == card
    assert (card.owner, card.kind, card.layers, card.rank) == ("acme", "lora", (1, 2), 4)
    assert card.base == ref(base())
    assert card.training == TrainingInfo(method="unknown")


def test_peft_loads_what_was_packed(
    raw: Path, tmp_path: Path, do_pack: Callable[..., ExpertCard], make_model: Callable[..., Any]
) -> None:
    import torch
    from peft import PeftModel

    do_pack(raw)
    tokens = torch.arange(12).reshape(2, 6)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        ours = PeftModel.from_pretrained(make_model(), tmp_path / "out").eval()(tokens).logits
        theirs = PeftModel.from_pretrained(make_model(), raw).eval()(tokens).logits
        plain = make_model().eval()(tokens).logits
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, plain)


def test_everything_in_the_card(
    raw: Path, tmp_path: Path, do_pack: Callable[..., ExpertCard], base: Base
) -> None:
    x = np.random.default_rng(0).normal(size=(50, 32))
    statistics = Statistics.from_states(x)
    info = RoutingInfo(
        statistics=StatisticsInfo(layer=1, normalization="none", tokens=50, documents=5),
        rows=RowsInfo(layers=(1, 2), has_bias=True, public_digest="a" * 64, init="domain_embedding"),
    )
    tensors = {
        "statistics.count": np.array([statistics.count]),
        "statistics.sum": statistics.sum,
        "statistics.scatter": statistics.scatter,
    }
    for layer in (1, 2):
        tensors[f"row.{layer}.weight"] = x[layer].astype(np.float32)
        tensors[f"row.{layer}.bias"] = np.array([-0.5], np.float32)
    RoutingArtifacts(info=info, tensors=tensors).save(raw)
    training = TrainingInfo(
        method="lora-coordinated", tokens=100, steps=4, seconds=1.5, settings={"lr": 2e-3}
    )
    card = do_pack(
        raw,
        training=training,
        routing=info,
        metrics={"held_out_nll": 2.25},
        description="contracts",
        terms=Terms(commercial=False, purposes=("research",)),
        license="mit or apache-2.0",
    )
    assert (card.training, card.routing, card.metrics) == (training, info, {"held_out_nll": 2.25})
    assert (card.license, card.terms.commercial) == ("MIT OR Apache-2.0", False)
    assert [entry.path for entry in card.files][-1] == "routing.safetensors"
    assert check_expert(tmp_path / "out", card, base()).layers == (1, 2)
    loaded = RoutingArtifacts.load(tmp_path / "out", info).statistics
    assert loaded is not None
    assert np.array_equal(loaded.scatter, statistics.scatter)


def test_routing_must_be_described(raw: Path, do_pack: Callable[..., ExpertCard]) -> None:
    (raw / "routing.safetensors").touch()
    with pytest.raises(AdmissionError) as caught:
        do_pack(raw)
    assert str(caught.value) == (
        f"'{raw}' cannot be packed:\n"
        "  - routing.safetensors: not described; say what it holds (routing=...) or remove it"
    )
    (raw / "routing.safetensors").unlink()
    with pytest.raises(AdmissionError) as caught:
        do_pack(raw, routing=RoutingInfo())
    assert str(caught.value) == f"'{raw}' cannot be packed:\n  - routing.safetensors: missing"


def test_routing_layers_must_exist(raw: Path, do_pack: Callable[..., ExpertCard]) -> None:
    info = RoutingInfo(rows=RowsInfo(layers=(3,), has_bias=False, public_digest="a" * 64, init="zeros"))
    RoutingArtifacts(info=info, tensors={"row.3.weight": np.zeros(32, np.float32)}).save(raw)
    with pytest.raises(AdmissionError) as caught:
        do_pack(raw, routing=info)
    assert str(caught.value) == (
        "The card of expert 'acme/contracts' does not say what its files say:\n"
        "  - routing.rows.layers: the base has no layer 3; it has 0 to 2"
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "gemma3_text", "gpt_neox", "phi3", "phi"])
def test_ffn(
    family: str,
    tmp_path: Path,
    base: Base,
    base_folder: Callable[..., Path],
    do_pack: Callable[..., ExpertCard],
    ref: Ref,
) -> None:
    folder = ffn_folder(tmp_path / "raw", base_folder(family), [0, 2], dtype="F32")
    card = do_pack(folder, base=base(family), base_ref=ref(base(family)))
    assert (card.kind, card.layers, card.rank) == ("ffn", (0, 2), None)
    summary = check_expert(tmp_path / "out", card, base(family))
    assert (summary.ffn_only, summary.dtype) == (True, "F32")
    expected = sum(
        a.size for n, a in load_file(base_folder(family) / "model.safetensors").items() if ".mlp." in n
    )
    assert summary.parameters * 3 == expected * 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["base"] == "pico"


FFN_SCHEMA = (
    "ffn.safetensors of expert 'acme/contracts' does not hold exactly the tensors that config.json gives on the base "
    "'pico' (all of one dtype out of F32, BF16, F16):\n  - "
)
FFN: dict[str, tuple[list[int], dict[str, Any], str]] = {
    "missing layer": (
        [1],
        {"layers": [1, 2]},
        f"{FFN_SCHEMA}tensor 'model.layers.2.mlp.down_proj.weight': missing, F32 (32, 48) expected\n"
        "  - tensor 'model.layers.2.mlp.gate_proj.weight': missing, F32 (48, 32) expected\n"
        "  - tensor 'model.layers.2.mlp.up_proj.weight': missing, F32 (48, 32) expected",
    ),
    "extra layer": (
        [1, 2],
        {"layers": [1]},
        f"{FFN_SCHEMA}tensor 'model.layers.2.mlp.down_proj.weight': F32 (32, 48) found, not allowed here\n"
        "  - tensor 'model.layers.2.mlp.gate_proj.weight': F32 (48, 32) found, not allowed here\n"
        "  - tensor 'model.layers.2.mlp.up_proj.weight': F32 (48, 32) found, not allowed here",
    ),
    "declared dtype": (
        [1],
        {"dtype": "BF16"},
        f"{FFN_SCHEMA}tensor 'model.layers.1.mlp.gate_proj.weight': F32 (48, 32) found, BF16 (48, 32) expected\n"
        "  - tensor 'model.layers.1.mlp.up_proj.weight': F32 (48, 32) found, BF16 (48, 32) expected\n"
        "  - tensor 'model.layers.1.mlp.down_proj.weight': F32 (32, 48) found, BF16 (32, 48) expected",
    ),
    "no such layer": (
        [1],
        {"layers": [1, 3, 9]},
        "config.json does not fit the base:\n  - layers: the base has no layer 3; it has 0 to 2\n"
        "  - layers: the base has no layer 9; it has 0 to 2",
    ),
    "descending": (
        [1, 2],
        {"layers": [2, 1]},
        "config.json does not fit the base:\n  - layers: [2, 1] must ascend without repetition",
    ),
    "unknown keys": (
        [1],
        {"layer": 1, "dtype": "F64"},
        "config.json has 2 problems:\n"
        "  - dtype: input should be 'F32', 'BF16' or 'F16', given 'F64'\n"
        "  - layer: unknown key; did you mean 'layers'? Allowed: base, dtype, format_version, layers",
    ),
}


@pytest.mark.parametrize(("layers", "config", "message"), FFN.values(), ids=FFN)
def test_ffn_refused(
    layers: list[int],
    config: dict[str, Any],
    message: str,
    tmp_path: Path,
    base_folder: Callable[..., Path],
    do_pack: Callable[..., ExpertCard],
) -> None:
    folder = ffn_folder(tmp_path / "raw", base_folder(), layers, **config)
    with pytest.raises(AdmissionError) as caught:
        do_pack(folder)
    assert str(caught.value) == message
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_left_behind(raw: Path, tmp_path: Path, do_pack: Callable[..., ExpertCard]) -> None:
    for name in ("README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (raw / name).write_text("x")
    do_pack(raw)
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_options_of_later_peft_versions(
    raw: Path, tmp_path: Path, do_pack: Callable[..., ExpertCard]
) -> None:
    path = raw / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"use_new_thing": None}))
    do_pack(raw)
    assert "use_new_thing" not in json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    path.write_text(json.dumps(config | {"use_new_thing": False}))
    with pytest.raises(AdmissionError) as caught:
        do_pack(raw, staging=tmp_path / "second")
    assert str(caught.value) == (
        "adapter_config.json is not allowed for a lora expert:\n  - use_new_thing: unknown key"
    )


def test_hostile_raw_folder(raw: Path, tmp_path: Path, do_pack: Callable[..., ExpertCard]) -> None:
    (raw / ".git").mkdir()
    (raw / "training_args.bin").touch()
    (raw / "model.pt").touch()
    os.mkfifo(raw / "pipe")
    (raw / "README.md").unlink()
    (raw / "README.md").symlink_to("/etc/hostname")
    weights = raw / "adapter_model.safetensors"
    weights.rename(tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    os.link(raw / "adapter_config.json", tmp_path / "second")
    with pytest.raises(AdmissionError) as caught:
        do_pack(raw)
    assert str(caught.value) == (
        f"'{raw}' cannot be packed:\n"
        "  - .git: a folder that is no part of a lora expert; remove it\n"
        "  - README.md: a symbolic link; a regular file is needed\n"
        "  - adapter_config.json: has 2 hard links; copy the file\n"
        "  - adapter_model.safetensors: a symbolic link; a regular file is needed\n"
        "  - model.pt: a regular file that is no part of a lora expert; remove it\n"
        "  - pipe: a FIFO that is no part of a lora expert; remove it\n"
        "  - training_args.bin: a regular file that is no part of a lora expert; remove it"
    )


LOOKED_FOR = (
    ". Looked for:\n  - dense: config.json and model.safetensors\n  - ffn: config.json and ffn.safetensors\n"
    "  - lora: adapter_config.json and adapter_model.safetensors"
)


def test_not_an_expert(tmp_path: Path, raw: Path, do_pack: Callable[..., ExpertCard]) -> None:
    def message(folder: Path) -> str:
        with pytest.raises(AdmissionError) as caught:
            do_pack(folder)
        return str(caught.value)

    empty = tmp_path / "empty"
    assert message(empty) == f"'{empty}' is not an expert folder: there is no such folder{LOOKED_FOR}"
    empty.mkdir()
    assert message(empty) == f"'{empty}' is not an expert folder{LOOKED_FOR}"
    (raw / "adapter_model.safetensors").rename(raw / "adapter_model.bin")
    assert message(raw) == (
        f"'{raw}' is not an expert folder: adapter_model.bin is a pickle, which is never read; save the adapter again "
        f"with save_pretrained(..., safe_serialization=True){LOOKED_FOR}"
    )
    for name in ("adapter_model.safetensors", "ffn.safetensors", "config.json"):
        (raw / name).touch()
    assert (
        message(raw) == f"'{raw}' holds the files of several kinds of expert: ffn and lora; keep one of them."
    )


def test_packed_already(raw: Path, tmp_path: Path, do_pack: Callable[..., ExpertCard]) -> None:
    do_pack(raw)
    with pytest.raises(AdmissionError) as caught:
        do_pack(tmp_path / "out", staging=tmp_path / "again")
    assert str(caught.value) == (
        f"'{tmp_path / 'out'}' is packed already: it holds card.json. Register it as it is."
    )
    with pytest.raises(AdmissionError) as caught:
        do_pack(raw)
    assert str(caught.value) == f"'{tmp_path / 'out'}' exists and is not an empty folder; name another one."


def test_bad_names(raw: Path, do_pack: Callable[..., ExpertCard]) -> None:
    with pytest.raises(UnknownNameError, match="'Contracts' is not an expert name"):
        do_pack(raw, name="Contracts")
    with pytest.raises(UnknownNameError) as unknown:
        do_pack(raw, kind="fnn")
    assert (
        str(unknown.value)
        == "Unknown expert kind 'fnn'. Did you mean 'ffn'? Known: dense, ffn, lora, retriever."
    )
    with pytest.raises(CardError, match="'Apche' is not an SPDX licence expression"):
        do_pack(raw, license="Apche")
    with pytest.raises(CardError) as caught:
        do_pack(raw, metrics={"nll": float("nan")})
    assert str(caught.value) == (
        "Card of expert 'acme/contracts': not plain data: a number is not finite, or the data contain themselves."
    )


def test_nothing_is_left_after_a_failure(
    raw: Path, tmp_path: Path, do_pack: Callable[..., ExpertCard], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experts.package, "check_expert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        do_pack(raw)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_no_space_left(
    raw: Path, tmp_path: Path, do_pack: Callable[..., ExpertCard], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        do_pack(raw)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_staging_may_be_an_empty_folder(
    raw: Path, tmp_path: Path, do_pack: Callable[..., ExpertCard]
) -> None:
    (tmp_path / "out").mkdir()
    assert do_pack(raw) == read_package(tmp_path / "out")


def test_same_input_gives_the_same_digest(
    raw: Path, tmp_path: Path, do_pack: Callable[..., ExpertCard]
) -> None:
    first, second = do_pack(raw), do_pack(raw, staging=tmp_path / "second")
    assert first.digest == second.digest


def test_read_package(tmp_path: Path, raw: Path, do_pack: Callable[..., ExpertCard]) -> None:
    with pytest.raises(CardError) as caught:
        read_package(raw)
    assert str(caught.value) == f"'{raw}' holds no card.json; pack the expert first."
    do_pack(raw)
    out = tmp_path / "out"
    (out / "card.json").rename(tmp_path / "card")
    (out / "card.json").symlink_to(tmp_path / "card")
    with pytest.raises(CardError) as caught:
        read_package(out)
    assert str(caught.value) == f"'{out / 'card.json'}' is a symbolic link; put the file itself there."
    (out / "card.json").unlink()
    os.mkfifo(out / "card.json")
    with pytest.raises(CardError) as caught:
        read_package(out)
    assert str(caught.value) == f"'{out / 'card.json'}' is a FIFO; a regular file is needed."
