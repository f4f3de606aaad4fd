"""The composed folder: a SentenceTransformer after one import, PEFT and a stock model inside, every time the same."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from composer.editing import add_experts, remove_experts
from composer.loading import load
from composer.lock import Lock
from experts.errors import BuildError, IntegrityError, OptOutError, UnknownNameError


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def stock_load(folder: Path, **options: Any) -> Any:
    """What a user does who knows sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    import composer.hf  # noqa: F401

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True, **options)


def test_the_folder_holds(retrievers: Any) -> None:
    folder = retrievers.folder()
    lock = Lock.read(folder)
    top = {path.name for path in folder.iterdir()}
    assert top >= {
        "README.md",
        "1_Pooling",
        "base",
        "base.json",
        "composition.json",
        "config.json",
        "config_sentence_transformers.json",
        "experts",
        "manifest.yaml",
        "modules.json",
        "sentence_bert_config.json",
        "tokenizer.json",
    }
    for expert in lock.experts:
        assert {path.name for path in (folder / expert.folder).iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "card.json",
            "routing.safetensors",
        }
    first, *rest = json.loads((folder / "modules.json").read_text())
    plain, *others = json.loads((folder / "base" / "modules.json").read_text())
    assert (first, rest) == ({**plain, "kwargs": ["task", "opt_out"]}, others)
    assert lock.optout_class == "exact"
    assert set(lock.lineage.values()) == {(), ("acme",), ("bob",), ("zoe",)}


def test_r1_the_base_inside_is_the_stock_model(retrievers: Any, pico: Any, texts: list[str]) -> None:
    from sentence_transformers import SentenceTransformer

    folder = retrievers.folder() / "base"
    assert tree(folder) == tree(pico.embedder())
    base = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    assert np.array_equal(base.encode(texts), retrievers.stock().encode(texts))


@pytest.mark.parametrize(
    "router", [{}, {"selector": "top1"}, {"selector": "top2", "route_on": "layer_state"}], ids=str
)
def test_r8_the_stock_class_loads_it_and_routes(
    retrievers: Any, texts: list[str], router: dict[str, Any]
) -> None:
    from sentence_transformers import SentenceTransformer

    ours = retrievers.model(**router)
    model = stock_load(retrievers.folder(**router))
    assert type(model) is SentenceTransformer
    queries = model.encode_query(texts)
    assert np.array_equal(queries, ours.encode_query(texts))
    assert np.array_equal(model.encode_document(texts), retrievers.stock().encode_document(texts))
    assert not np.allclose(queries, model.encode_document(texts), atol=1e-3)
    without = model.encode_query(texts, opt_out={"acme"})
    assert np.array_equal(without, ours.encode_query(texts, opt_out={"acme"}))
    left_out = stock_load(retrievers.folder(**router), model_kwargs={"opt_out": {"acme"}})
    assert np.array_equal(left_out.encode_query(texts), without)
    with pytest.raises(
        UnknownNameError, match=r"^Unknown owner 'acne'\. Did you mean 'acme'\? Known: acme, bob, zoe\.$"
    ):
        model.encode_query(texts, opt_out={"acne"})
    with pytest.raises(OptOutError) as caught:
        model.encode_query(texts, opt_out=[{"acme"}] * len(texts))
    assert str(caught.value) == (
        "opt_out has one set of owners per row, and texts are sorted by length on their way to the model. Load the "
        "folder with composer.load, whose encode_query takes such a list, or call encode_query once for each set."
    )


def _with_modules(retrievers: Any, pico: Any, change: Any) -> Path:
    folder = shutil.copytree(retrievers.folder(), pico.scratch("copy"))
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(change(modules)))
    return folder


@pytest.mark.parametrize("door", [load, stock_load])
@pytest.mark.parametrize("passed", [[], ["task"]])
def test_r8_a_folder_that_hides_the_task_is_refused(
    retrievers: Any, pico: Any, passed: Any, door: Any
) -> None:
    folder = _with_modules(retrievers, pico, lambda m: [{**m[0], "kwargs": passed}, *m[1:]])
    with pytest.raises(BuildError) as caught:
        door(folder)
    assert str(caught.value) == (
        f"{folder / 'modules.json'} passes {passed} to its first module; task, opt_out are needed, or queries would "
        "be encoded as documents. Build the folder again."
    )


@pytest.mark.parametrize("modules", [[], {}, [1], [{"kwargs": 1}]])
def test_r8_modules_that_are_none_are_refused(retrievers: Any, pico: Any, modules: Any) -> None:
    folder = _with_modules(retrievers, pico, lambda _: modules)
    with pytest.raises(BuildError) as caught:
        load(folder)
    assert str(caught.value) == (
        f"{folder / 'modules.json'} is missing or is no list of modules. Build the folder again."
    )


def test_r8_the_encoder_names_the_task() -> None:
    """Sentence-transformers hands the task on only to a forward that names it."""
    import inspect

    from composer.retrieval.model import RetrieverEncoder

    assert {"task", "opt_out", "allowed"} <= set(inspect.signature(RetrieverEncoder.forward).parameters)


def test_without_the_import_the_stock_class_says_so(retrievers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    import composer.hf  # noqa: F401

    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "coterie_retriever")
    with pytest.raises(
        ValueError, match="has model type `coterie_retriever` but Transformers does not recognize"
    ):
        stock_load(retrievers.folder())


# -------------------------------------------------------------------- settings that decide vectors


def _edited(path: Path, change: Any) -> None:
    text = path.read_text()
    edited = change(text)
    assert edited != text
    path.unlink()  # it may be linked elsewhere
    path.write_text(edited)


def _setting(**keys: Any) -> Any:
    return lambda text: json.dumps({**json.loads(text), **keys})


EDITS: dict[str, tuple[str, Any]] = {
    "pooling": ("1_Pooling/config.json", _setting(pooling_mode="cls")),
    "longest input": ("sentence_bert_config.json", _setting(max_seq_length=4)),
    "tokens": ("tokenizer_config.json", _setting(model_max_length=4)),
    "prompts": ("config_sentence_transformers.json", _setting(prompts={"query": "zo ", "document": "zo "})),
    "vocabulary": ("tokenizer.json", lambda text: text.replace('"ba"', '"xx"')),
}
"""What -> file and edit; every one is understood by sentence-transformers."""


@pytest.mark.parametrize("door", [load, stock_load])
@pytest.mark.parametrize("place", ["", "base/"], ids=["top", "base"])
@pytest.mark.parametrize("what", EDITS)
def test_r20_edited_settings_are_refused(
    retrievers: Any, pico: Any, what: str, place: str, door: Any
) -> None:
    """At every place and by every loader, although the experts' files and the base's tensors are untouched."""
    name, change = EDITS[what]
    folder = shutil.copytree(retrievers.folder(), pico.scratch("copy"))
    path = folder / f"{place}{name}"
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    _edited(path, change)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(IntegrityError) as caught:
        door(folder)
    assert str(caught.value) == (
        f"{path} has sha256 {found}, the composition says {expected}. It decides how texts become vectors, so they "
        "would not fit those of an index. Build the folder again."
    )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("what", EDITS)
def test_r20_the_control_such_an_edit_changes_documents(
    retrievers: Any, pico: Any, what: str, texts: list[str]
) -> None:
    name, change = EDITS[what]
    folder = shutil.copytree(pico.embedder(), pico.scratch("stock"))
    _edited(folder / name, change)
    documents = stock_load(folder).encode_document(texts)
    assert np.abs(documents - retrievers.stock().encode_document(texts)).max() > 1e-3


def test_r20_files_that_come_and_go_are_named(retrievers: Any, pico: Any) -> None:
    folder = shutil.copytree(retrievers.folder(), pico.scratch("copy"))
    added = folder / "added_tokens.json"
    added.write_text("{}")
    with pytest.raises(BuildError) as caught:
        load(folder)
    assert str(caught.value) == (
        f"{added} was added after the build: the base has no such file, and it may decide how texts become vectors. "
        "Remove it, or build the folder again."
    )
    added.unlink()
    load(folder)
    pooling = folder / "1_Pooling" / "config.json"
    pooling.unlink()
    with pytest.raises(BuildError) as caught:
        load(folder)
    assert str(caught.value) == f"{pooling} is missing. Build the folder again."


def test_r20_links_to_the_bases_files_are_followed(retrievers: Any, pico: Any, texts: list[str]) -> None:
    """As somebody may keep one copy of a base for many folders."""
    folder, kept = Path(shutil.copytree(retrievers.folder(), pico.scratch("linked"))), pico.scratch("kept")
    shutil.move(folder / "base", kept)
    for path in sorted(p for p in kept.rglob("*") if p.is_file()):
        name = path.relative_to(kept)
        (folder / "base" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "base" / name).symlink_to(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "1_Pooling/config.json"):
        (folder / name).unlink()
        (folder / name).symlink_to(kept / name)
    assert np.array_equal(load(folder).encode_query(texts), retrievers.model().encode_query(texts))


def test_r20_other_modules_than_the_bases_are_refused(retrievers: Any, pico: Any) -> None:
    folder = _with_modules(retrievers, pico, lambda modules: modules[:2])  # without normalisation
    with pytest.raises(BuildError) as caught:
        load(folder)
    assert str(caught.value) == (
        f"{folder / 'modules.json'} lists other modules than base/modules.json. Build the folder again."
    )


def test_r20_a_description_of_another_base_is_refused(retrievers: Any, pico: Any) -> None:
    folder = shutil.copytree(retrievers.folder(), pico.scratch("copy"))
    _edited(folder / "base.json", lambda text: text.replace('"cosine"', '"dot"'))
    with pytest.raises(BuildError) as caught:
        load(folder)
    assert str(caught.value) == (
        f"{folder / 'base.json'} describes another base than the one beside it: similarity: 'cosine' in base/, 'dot' "
        "in base.json. Build the folder again."
    )


@pytest.mark.parametrize("door", [load, stock_load])
def test_r20_a_flipped_byte_of_what_is_routed_by_is_refused(
    retrievers: Any, pico: Any, texts: list[str], door: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number of one owner's sums; the control shows that it would move queries of others."""
    folder = shutil.copytree(retrievers.folder(), pico.scratch("copy"))
    [acme] = [expert for expert in Lock.read(folder).experts if expert.owner == "acme"]
    path = folder / acme.folder / "routing.safetensors"
    with safe_open(path, framework="np") as file:
        sums = file.get_tensor("retrieval.embedding.sum")
    data = bytearray(path.read_bytes())
    start = bytes(data).index(sums.tobytes())
    data[start + sums.itemsize - 4] ^= 0x80  # what is grossly wrong is refused by its value
    path.unlink()
    path.write_bytes(data)
    expected = next(entry.sha256 for entry in acme.files if entry.path == "routing.safetensors")
    found = hashlib.sha256(data).hexdigest()
    with pytest.raises(IntegrityError) as caught:
        door(folder)
    assert str(caught.value) == (
        f"{path} has sha256 {found}, the composition says {expected}. Build the folder again."
    )
    left = load(folder, opt_out={"acme"})  # is not opened
    assert np.array_equal(left.encode_query(texts), retrievers.model().encode_query(texts, opt_out={"acme"}))
    monkeypatch.setattr("composer.members.Members.check_published", lambda members: None)
    moved = door(folder).encode_query(texts) - retrievers.model().encode_query(texts)
    assert (np.abs(moved).max(axis=1) > 1e-6).sum() > len(texts) // 2


# -------------------------------------------------------------------- saved, built again, changed


def test_r25_saved_and_built_again_byte_for_byte(retrievers: Any, pico: Any, texts: list[str]) -> None:
    folder = retrievers.folder()
    out = pico.scratch("saved")
    model = load(folder)
    model.save_pretrained(str(out))
    assert tree(out) == tree(folder)
    again = pico.scratch("again")
    load(out).save(str(again))
    assert tree(again) == tree(out)
    assert tree(retrievers.compose(retrievers.manifest())) == tree(folder)
    assert np.array_equal(load(again).encode_query(texts), model.encode_query(texts))


def test_r3_the_order_of_the_manifest_is_not_its_meaning(retrievers: Any) -> None:
    turned = retrievers.compose(retrievers.manifest(list(reversed(retrievers.experts))))
    differing = {name for name, digest in tree(turned).items() if tree(retrievers.folder())[name] != digest}
    assert differing == {"composition.json", "manifest.yaml"}
    assert Lock.read(turned).membership_digest == Lock.read(retrievers.folder()).membership_digest


def test_r3_taking_out_and_putting_in_equal_a_fresh_build(retrievers: Any, pico: Any) -> None:
    fresh = {
        gone: tree(retrievers.folder([e for e in retrievers.experts if not e.startswith(f"{gone}/")]))
        for gone in retrievers.owners
    }
    folder = pico.scratch("edited")
    shutil.copytree(retrievers.folder(), folder)
    for gone in retrievers.owners:
        remove_experts(folder, [gone])
        assert tree(folder) == fresh[gone]
        # R4: nothing of the owner is left, in no file's name and in no file's text
        for path in folder.rglob("*"):
            assert gone not in path.name
            if path.is_file() and path.suffix in {".json", ".yaml", ".md"} and "token" not in path.name:
                assert f"{gone}/" not in path.read_text()
        add_experts(folder, [f"{gone}/search"], registry=pico.retriever_library())
        assert {k: v for k, v in tree(folder).items() if k not in ("composition.json", "manifest.yaml")} == {
            k: v
            for k, v in tree(retrievers.folder()).items()
            if k not in ("composition.json", "manifest.yaml")
        }


def test_r3_the_routers_are_equal_bit_for_bit(retrievers: Any) -> None:
    whole = retrievers.model()[0].model.engine.router
    for i, gone in enumerate(retrievers.owners):
        kept = [e for e in retrievers.experts if not e.startswith(gone)]
        alone = retrievers.model(kept)[0].model.engine.router
        without = tuple(j for j in range(3) if j != i)
        assert whole.solved(without).to_bytes() == alone.solved((0, 1)).to_bytes()


def test_changed_weights_are_not_saved(retrievers: Any, pico: Any) -> None:
    model = load(retrievers.folder())
    layer = next(m for m in model.modules() if type(m).__name__ == "StackedLoRA")
    layer.up.data[1] += 1
    with pytest.raises(BuildError, match=r"was changed after loading, so it is no owner's published weight"):
        model.save_pretrained(str(pico.scratch("saved")))
    with pytest.raises(BuildError) as caught:
        model[0].model.save_pretrained(str(pico.scratch("saved")))
    assert str(caught.value) == (
        "The encoder of a composed retriever is not saved alone, since its weights are its owners' published files. "
        "Save the model that composer.load returns, or copy the folder it was loaded from."
    )


def test_the_card_tells_what_it_is(retrievers: Any) -> None:
    text = (retrievers.folder() / "README.md").read_text()
    assert "Recipe `router_retriever`, router `lda`, selector `soft`." in text
    assert "| acme/search | 1 | acme | acme | Apache-2.0 | retriever |" in text
    assert "Class `exact`: no file here mixes owners." in text


def test_arguments_of_language_models_are_refused(retrievers: Any) -> None:
    with pytest.raises(BuildError) as caught:
        load(retrievers.folder(), experts_implementation="eager")
    assert str(caught.value) == (
        "experts_implementation chooses kernels of FFN experts; a retriever has none. Leave it out."
    )
    with pytest.raises(BuildError) as caught:
        stock_load(retrievers.folder(), model_kwargs={"opt_in": {"acme"}})
    assert str(caught.value) == (
        "Unknown arguments for loading a composed retriever: opt_in. Allowed: opt_out, registry, verify, dtype, "
        "attn_implementation."
    )
