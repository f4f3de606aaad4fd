"""Kind ``retriever``: what PEFT writes is admitted, everything else is refused; and the base must be the very one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from experts.errors import AdmissionError
from experts.kinds import detect_kind, get_kind
from experts.kinds.retriever import retriever_spec
from experts.package import read_package
from registry import Registry


@pytest.fixture(scope="module")
def raw(pico: Any) -> Path:
    return pico.write_retriever(pico.scratch("raw"), seed=1)


def changed(raw: Path, folder: Path, **keys: object) -> Path:
    copy = shutil.copytree(raw, folder)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | keys))
    return copy


def test_what_peft_writes_is_admitted(pico: Any, raw: Path) -> None:
    card = read_package(pico.pack_retriever(raw, name="acme/search"))
    assert (card.kind, card.layers, card.rank) == ("retriever", (2, 3), 2)
    assert card.base.embedding == pico.embedder_description().embedding
    config = get_kind("retriever").read_config(raw / "adapter_config.json")
    spec = retriever_spec(config, pico.embedder_description())
    linears = ("attention.self.query", "attention.self.value", "intermediate.dense")
    assert set(spec.modules) == {f"encoder.layer.{n}.{linear}" for n in (2, 3) for linear in linears}
    assert {module.scaling for module in spec.modules.values()} == {4.0}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["query", "key", "value", "attention.output.dense", "output.dense"]},
        {"target_modules": ["dense"], "layers": (0,)},
        {"task_type": None},
        {"use_rslora": True, "rank_pattern": {"query": 4}},
    ],
)
def test_any_linears_and_layers(pico: Any, settings: dict[str, Any]) -> None:
    raw = pico.write_retriever(pico.scratch("raw"), seed=2, **settings)
    card = read_package(pico.pack_retriever(raw, name="acme/search"))
    assert card.layers == settings.get("layers", (2, 3))


def test_the_base_tells_the_kind(raw: Path) -> None:
    assert detect_kind(raw, embeds=True).name == "retriever"
    assert detect_kind(raw).name == "lora"


def test_an_adapter_for_a_language_model_is_refused(pico: Any, raw: Path, tmp_path: Path) -> None:
    with pytest.raises(AdmissionError) as caught:
        pico.pack_retriever(changed(raw, tmp_path / "raw", task_type="CAUSAL_LM"), name="acme/search")
    assert str(caught.value) == (
        "adapter_config.json is not allowed for a retriever expert:\n  - task_type: 'CAUSAL_LM' found; allowed is "
        "'FEATURE_EXTRACTION' (other tasks add tensors) or null"
    )


def test_targets_outside_the_layers_are_refused(pico: Any, raw: Path, tmp_path: Path) -> None:
    copy = changed(raw, tmp_path / "raw", target_modules=["word_embeddings", "quary"])
    with pytest.raises(AdmissionError) as caught:
        pico.pack_retriever(copy, name="acme/search")
    assert str(caught.value) == (
        "adapter_config.json does not fit the base:\n  - target_modules: 'word_embeddings' matches no linear of the "
        "base's layers. Known: dense, key, query, value\n  - target_modules: 'quary' matches no linear of the base's "
        "layers; did you mean 'query'? Known: dense, key, query, value"
    )


def test_a_tensor_too_many_is_refused(pico: Any, raw: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    copy = shutil.copytree(raw, tmp_path / "raw")
    tensors = load_file(copy / "adapter_model.safetensors")
    name = next(name for name in tensors if "query.lora_A" in name)
    extra = name.replace("query", "key")
    save_file(tensors | {extra: tensors[name].copy()}, copy / "adapter_model.safetensors")
    with pytest.raises(AdmissionError) as caught:
        pico.pack_retriever(copy, name="acme/search")
    assert caught.value.problems == (f"tensor '{extra}': F32 (2, 32) found, not allowed here",)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "lora",
            "An expert of kind 'lora' is made for a language model, and the base at hand is an embedding model. Use "
            "another base, or another kind of expert.",
        ),
        (
            "retriever",
            "An expert of kind 'retriever' is made for an embedding model (a sentence-transformers folder), and the "
            "base at hand is a language model. Use another base, or another kind of expert.",
        ),
    ],
)
def test_a_kind_for_the_other_sort_of_base_is_refused(pico: Any, kind: str, message: str) -> None:
    base = pico.embedder_description() if kind == "lora" else pico.description()
    with pytest.raises(AdmissionError) as caught:
        get_kind(kind).check_base(base)
    assert str(caught.value) == message


# ------------------------------------------------------------ the registry: the very base, and nothing else


def test_registers_lists_and_verifies(pico: Any) -> None:
    registry: Registry = pico.retriever_library()
    records = registry.experts()
    assert [(record.name, record.kind, record.base_name) for record in records] == [
        (f"{owner}/search", "retriever", "embedder") for owner in pico.owners
    ]
    assert registry.verify().ok
    base = registry.base("embedder")
    assert base.description == pico.embedder_description()
    stored = {file.path for file in base.files}
    assert stored == {
        path.relative_to(pico.embedder()).as_posix() for path in pico.embedder().rglob("*") if path.is_file()
    }


def test_the_stored_base_is_the_folder_again(pico: Any, tmp_path: Path) -> None:
    from pipelines.train.anchor import resolve_base

    with resolve_base("embedder", registry=pico.retriever_library()) as base:
        for path in pico.embedder().rglob("*.json"):
            assert (base.folder / path.relative_to(pico.embedder())).read_bytes() == path.read_bytes()
        assert base.ref.embedding == base.description.embedding


def test_another_base_by_one_byte_is_refused(pico: Any, raw: Path, tmp_path: Path) -> None:
    from experts.base import BaseDescription

    folder = shutil.copytree(pico.embedder(), tmp_path / "flipped")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    registry = Registry(tmp_path / "registry")
    registry.add_base(folder, name="embedder")
    package = pico.pack_retriever(raw, name="acme/search")
    fingerprint, flipped = (
        pico.embedder_description().fingerprint,
        BaseDescription.from_folder(folder).fingerprint,
    )
    tokenizer = read_package(package).base.tokenizer_fingerprint
    with pytest.raises(AdmissionError) as caught:
        registry.register(package)
    assert str(caught.value) == (
        f"'acme/search' was made for the base 'embedder' (tensors sha256:{fingerprint}, tokenizer "
        f"sha256:{tokenizer}), which the registry '{tmp_path / 'registry'}' does not have. Add that base with 'coterie "
        "base add', or train the expert on one that is there:\n  - base 'embedder': tensors "
        f"sha256:{flipped}, tokenizer sha256:{tokenizer}"
    )


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"pooling": "cls"}, "pooling: 'mean' in the card, 'cls' in the base at hand"),
        ({"normalize": False}, "normalize: True in the card, False in the base at hand"),
        ({"similarity": "dot"}, "similarity: 'cosine' in the card, 'dot' in the base at hand"),
        (
            {"prompts": {"query": "query: "}},
            "prompts: {} in the card, {'query': 'query: '} in the base at hand",
        ),
    ],
)
def test_a_base_with_equal_tensors_and_another_way_to_embed_is_refused(
    pico: Any, raw: Path, tmp_path: Path, settings: dict[str, Any], problem: str
) -> None:
    registry = Registry(tmp_path / "registry")
    registry.add_base(pico.embedder(**settings), name="embedder")
    package = pico.pack_retriever(raw, name="acme/search")
    with pytest.raises(AdmissionError) as caught:
        registry.register(package)
    assert str(caught.value) == (
        "Expert 'acme/search' was trained on the base 'embedder' with other embedding settings than the base at hand "
        f"has. Train it on this base, or use the one it was trained on:\n  - {problem}"
    )
    registry.add_base(pico.embedder(), name="plain")  # now there are two with these tensors
    assert registry.register(package).base_name == "plain"


def test_statistics_at_a_layer_that_is_not_there_are_refused(pico: Any, raw: Path, tmp_path: Path) -> None:
    artifacts = pico.retrieval_artifacts(1)
    info = artifacts.info.model_copy(update={"state": artifacts.info.state.model_copy(update={"layer": 4})})
    import dataclasses

    with pytest.raises(AdmissionError) as caught:
        pico.pack_retriever(
            shutil.copytree(raw, tmp_path / "raw"),
            name="acme/search",
            artifacts=dataclasses.replace(artifacts, info=info),
        )
    assert caught.value.problems == ("routing.retrieval.state.layer: the base has no layer 4; it has 0 to 3",)


def test_statistics_of_other_embeddings_are_refused(pico: Any, raw: Path, tmp_path: Path) -> None:
    import dataclasses

    artifacts = pico.retrieval_artifacts(1)
    info = artifacts.info.model_copy(update={"normalization": "none"})
    with pytest.raises(AdmissionError) as caught:
        pico.pack_retriever(
            shutil.copytree(raw, tmp_path / "raw"),
            name="acme/search",
            artifacts=dataclasses.replace(artifacts, info=info),
        )
    assert caught.value.problems == (
        "routing.retrieval.normalization: 'none', and the base's embeddings have 'l2'",
    )
