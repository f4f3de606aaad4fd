"""Embedding bases: what is read from a sentence-transformers folder, what is refused, what an expert is held to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experts.admission import check_embedding
from experts.base import BaseDescription
from experts.card import BaseRef
from experts.embedding import EmbeddingSpec, read_embedding
from experts.errors import AdmissionError

Edit = Callable[[str, Callable[[Any], Any]], Path]


@pytest.fixture
def edited(pico_embedder: Path, tmp_path: Path) -> Edit:
    """A copy of the pico embedder with one JSON file changed: by a function, or taken away where it returns None."""

    def edit(name: str, change: Callable[[Any], Any]) -> Path:
        folder = shutil.copytree(pico_embedder, tmp_path / "edited", dirs_exist_ok=True)
        value = change(json.loads((folder / name).read_text()))
        (folder / name).unlink()
        if value is not None:
            (folder / name).write_text(json.dumps(value))
        return folder

    return edit


def read(folder: Path) -> EmbeddingSpec:
    config = json.loads((folder / "config.json").read_text())
    return read_embedding(folder, config=config, hidden_size=32)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"pooling": "cls", "normalize": False, "similarity": "dot", "max_seq_length": 32},
    {"prompts": {"query": "query: ", "document": "passage: "}},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_is_what_sentence_transformers_makes_of_the_folder(pico: Any, settings: dict[str, Any]) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(pico.embedder(**settings)), device="cpu")
    spec = pico.embedder_description(**settings).embedding
    assert spec.pooling == model[1].pooling_mode
    assert spec.normalize == (len(model) == 3)
    assert spec.similarity == model.similarity_fn_name
    assert spec.max_seq_length == model.max_seq_length
    assert spec.dimension == model.get_embedding_dimension()
    assert spec.prompts == {name: text for name, text in model.prompts.items() if text}


def test_the_older_spelling_says_the_same(edited: Edit) -> None:
    expected = read(edited("modules.json", lambda modules: modules))
    kinds = ("Transformer", "Pooling", "Normalize")
    edited(
        "modules.json",
        lambda modules: [
            {**module, "type": f"sentence_transformers.models.{kind}"}
            for module, kind in zip(modules, kinds, strict=True)
        ],
    )
    folder = edited("sentence_bert_config.json", lambda _: {"max_seq_length": 64, "do_lower_case": False})
    (folder / "1_Pooling/config.json").write_text(
        json.dumps(
            {
                "word_embedding_dimension": 32,
                "pooling_mode_cls_token": False,
                "pooling_mode_mean_tokens": True,
                "pooling_mode_max_tokens": False,
            }
        )
    )
    (folder / "config_sentence_transformers.json").write_text("{}")
    shutil.rmtree(folder / "2_Normalize")
    assert read(folder) == expected


def test_describes_a_bert(pico: Any) -> None:
    import torch

    description = pico.embedder_description()
    assert (description.layout.name, description.layers_prefix) == ("encoder", "encoder.layer")
    assert (description.num_layers, description.hidden_size, description.intermediate_size) == (4, 32, 48)
    expected = {
        name: (module.out_features, module.in_features)
        for name, module in pico.encoder().named_modules()
        if isinstance(module, torch.nn.Linear) and ".layer." in name
    }
    assert description.layer_linears() == expected
    up, down = description.ffn_linears(3).values()
    assert (up.name, down.name) == ("encoder.layer.3.intermediate.dense", "encoder.layer.3.output.dense")
    assert BaseDescription.from_json(description.to_json()) == description


NOT_UNDERSTOOD = "'{folder}' is not an embedding model that is understood:\n  - "
REFUSED: list[tuple[str, Callable[[Any], Any], str]] = [
    (
        "modules.json",
        lambda modules: [*modules[:2], {**modules[2], "type": "evil.Module"}],
        "modules.json: ['sentence_transformers.base.modules.transformer.Transformer', "
        "'sentence_transformers.sentence_transformer.modules.pooling.Pooling', 'evil.Module'] found; allowed are a "
        "Transformer (path ''), a Pooling (path '1_Pooling') and, or not, a Normalize (path '2_Normalize'), each with "
        "idx, name, path and type",
    ),
    (
        "modules.json",
        lambda modules: {"a": 1},
        "modules.json: {'a': 1} found; allowed are a Transformer (path ''), a Pooling (path '1_Pooling') and, or not, "
        "a Normalize (path '2_Normalize'), each with idx, name, path and type",
    ),
    (
        "1_Pooling/config.json",
        lambda config: {**config, "pooling_mode": ["mean", "max"]},
        "1_Pooling/config.json: pooling_mode is ['mean', 'max']; allowed is 'cls' or 'max' or 'mean' or "
        "'mean_sqrt_len_tokens'\n  - 1_Pooling/config.json: one way of pooling is needed, none found; known are cls, "
        "max, mean, mean_sqrt_len_tokens",
    ),
    (
        "1_Pooling/config.json",
        lambda config: {**config, "embedding_dimension": 64, "include_prompt": False},
        "1_Pooling/config.json: embedding_dimension is 64; allowed is 32\n  - 1_Pooling/config.json: include_prompt is "
        "False; allowed is True",
    ),
    (
        "1_Pooling/config.json",
        lambda config: None,
        "1_Pooling/config.json: missing; save the model again with SentenceTransformer.save_pretrained\n  - "
        "1_Pooling/config.json: one way of pooling is needed, none found; known are cls, max, mean, "
        "mean_sqrt_len_tokens",
    ),
    (
        "2_Normalize/config.json",
        lambda config: {**config, "module_output_name": "token_embeddings"},
        "2_Normalize/config.json: module_output_name is 'token_embeddings'; allowed is 'sentence_embedding'",
    ),
    (
        "sentence_bert_config.json",
        lambda config: {**config, "do_lower_case": True, "config_args": {"trust_remote_code": True}},
        "sentence_bert_config.json: do_lower_case is True; allowed is False\n  - sentence_bert_config.json: key "
        "'config_args' is not understood; known are max_seq_length, do_lower_case, transformer_task, modality_config, "
        "module_output_name",
    ),
    (
        "sentence_bert_config.json",
        lambda config: {**config, "max_seq_length": 512},
        "sentence_bert_config.json: max_seq_length is 512; a whole number from 2 to the encoder's 128 positions is "
        "needed",
    ),
    (
        "config_sentence_transformers.json",
        lambda config: {**config, "similarity_fn_name": "euclidean", "default_prompt_name": "query"},
        "config_sentence_transformers.json: default_prompt_name is 'query'; allowed is None\n  - "
        "config_sentence_transformers.json: similarity_fn_name is 'euclidean'; allowed is 'cosine' or 'dot' or None",
    ),
    (
        "config_sentence_transformers.json",
        lambda config: {**config, "prompts": {"query": 7}},
        "config_sentence_transformers.json: prompts must be texts by name",
    ),
    (
        "tokenizer_config.json",
        lambda config: {**config, "model_max_length": "long"},
        "tokenizer_config.json: model_max_length is 'long'; a whole number from 2 to the encoder's 128 positions is "
        "needed",
    ),
]


@pytest.mark.parametrize(("file", "change", "problem"), REFUSED)
def test_what_is_not_understood_is_refused(
    edited: Edit, file: str, change: Callable[[Any], Any], problem: str
) -> None:
    folder = edited(file, change)
    with pytest.raises(AdmissionError) as caught:
        read(folder)
    assert str(caught.value) == NOT_UNDERSTOOD.format(folder=folder) + problem


def test_an_encoder_alone_is_no_base(edited: Edit) -> None:
    folder = edited("modules.json", lambda _: None)
    with pytest.raises(AdmissionError) as caught:
        BaseDescription.from_folder(folder)
    assert str(caught.value) == (
        f"'{folder}' holds an encoder (model_type 'bert') without modules.json. An encoder is a base for retrievers, "
        "as a sentence-transformers folder: modules.json, 1_Pooling/config.json, sentence_bert_config.json, "
        "config_sentence_transformers.json. Load it with sentence-transformers and save it with save_pretrained."
    )


def test_an_encoder_with_a_head_is_no_base(pico_embedder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(pico_embedder, tmp_path / "head")
    tensors = load_file(folder / "model.safetensors")
    save_file({f"bert.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(AdmissionError) as caught:
        BaseDescription.from_folder(folder)
    assert str(caught.value) == (
        "The encoder's layers are called 'bert.encoder.layer.N', as in a model with a head; 'encoder.layer.N' is "
        "needed. Load the folder with sentence-transformers and save it with save_pretrained."
    )


def ref(base: BaseDescription, embedding: EmbeddingSpec | None) -> BaseRef:
    return BaseRef(
        name="pico", fingerprint=base.fingerprint, tokenizer_fingerprint="0" * 64, embedding=embedding
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"pooling": "cls"}, "pooling: 'cls' in the card, 'mean' in the base at hand"),
        ({"normalize": False}, "normalize: False in the card, True in the base at hand"),
        ({"similarity": "dot"}, "similarity: 'dot' in the card, 'cosine' in the base at hand"),
        ({"max_seq_length": 65}, "max_seq_length: 65 in the card, 64 in the base at hand"),
        ({"prompts": {"query": "q: "}}, "prompts: {'query': 'q: '} in the card, {} in the base at hand"),
    ],
)
def test_an_expert_for_other_embedding_settings_is_refused(
    pico: Any, change: dict[str, Any], problem: str
) -> None:
    base = pico.embedder_description()
    other = base.embedding.model_copy(update=change)
    with pytest.raises(AdmissionError) as caught:
        check_embedding("acme/search", ref(base, other), base)
    assert str(caught.value) == (
        "Expert 'acme/search' was trained on the base 'pico' with other embedding settings than the base at hand has. "
        f"Train it on this base, or use the one it was trained on:\n  - {problem}"
    )
    check_embedding("acme/search", ref(base, base.embedding), base)


def test_an_expert_of_a_language_model_is_none_of_an_embedding_model(pico: Any) -> None:
    base, decoder = pico.embedder_description(), pico.description()
    with pytest.raises(AdmissionError) as caught:
        check_embedding("acme/search", ref(base, None), base)
    assert str(caught.value) == (
        "The card of expert 'acme/search' says nothing of embeddings, and the base at hand is an embedding model. "
        "Train the expert on this base, or use the one it was trained on."
    )
    with pytest.raises(AdmissionError) as caught:
        check_embedding("acme/search", ref(decoder, base.embedding), decoder)
    assert str(caught.value) == (
        "The card of expert 'acme/search' describes embeddings, and the base at hand is no embedding model. Train the "
        "expert on this base, or use the one it was trained on."
    )


def test_a_card_of_old_keeps_its_bytes() -> None:
    """Cards from before embedding bases have no such field, and reading one must not add it."""
    old = {"fingerprint": "0" * 64, "name": "x", "revision": None, "tokenizer_fingerprint": "1" * 64}
    read_back = BaseRef.model_validate(old)
    assert read_back.model_dump(mode="json", exclude_unset=True) == old
