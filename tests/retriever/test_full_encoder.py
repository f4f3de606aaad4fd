"""Whole query encoders as experts: what is admitted, that they answer beside adapters, and that they leave exactly."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from composer.editing import add_experts, remove_experts
from composer.loading import load
from composer.lock import Lock
from composer.planning import plan
from composer.verify import verify_optout
from experts.admission import check_expert
from experts.card import CARD_FILE, ExpertCard, FileEntry
from experts.errors import AdmissionError, BuildError, ExpertWarning, PlanError
from experts.package import read_package
from registry import Registry

EXPERTS = ("acme/search", "vic/whole", "yan/whole")
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
WAYS: dict[str, dict[str, Any]] = {
    "two passes": {"selector": "top1"},
    "two experts": {"selector": "top2"},
    "all experts": {"selector": "soft"},
}


class Owners:
    """A registry with an adapter (acme) and two whole encoders (vic, yan), and what is composed of them."""

    def __init__(self, pico: Any, retrievers: Any) -> None:
        self.pico, self.retrievers = pico, retrievers
        self.raw = {"vic": self.tuned(5), "yan": self.tuned(6)}
        self.registry = Registry(shutil.copytree(pico.retriever_library().path, pico.scratch("registry")))
        self.packages = {
            owner: pico.pack_retriever(
                shutil.copytree(raw, pico.scratch("copy")),
                name=f"{owner}/whole",
                artifacts=pico.retrieval_artifacts(seed),
            )
            for (owner, raw), seed in zip(self.raw.items(), (2, 3), strict=True)
        }
        for package in self.packages.values():
            self.registry.register(package)

    def tuned(self, seed: int) -> Path:
        """What an owner has after fine-tuning the whole model and saving it with sentence-transformers."""
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(self.pico.embedder()), device="cpu", local_files_only=True)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        model.encode(["the tokenizer is set up for cutting off and padding, which is saved with it"])
        folder: Path = self.pico.scratch("raw")
        model.save_pretrained(str(folder), create_model_card=False)
        return folder

    def alone(self, owner: str) -> Any:
        """The owner's model as sentence-transformers alone loads it."""
        from sentence_transformers import SentenceTransformer

        return self.pico.once(
            lambda: SentenceTransformer(str(self.raw[owner]), device="cpu", local_files_only=True),
            "tuned",
            owner,
        )

    def folder(self, experts: Any = EXPERTS, **router: Any) -> Path:
        manifest = self.retrievers.manifest(experts, **router)
        made: Path = self.pico.once(
            lambda: self.retrievers.compose(manifest, registry=self.registry), "whole folder", manifest.digest
        )
        return made

    def model(self, experts: Any = EXPERTS, **router: Any) -> Any:
        folder = self.folder(experts, **router)
        return self.pico.once(lambda: load(folder), "whole", folder)


@pytest.fixture(scope="module")
def owners(pico: Any, retrievers: Any) -> Owners:
    return Owners(pico, retrievers)


@pytest.fixture(params=WAYS, scope="module")
def way(request: Any) -> dict[str, Any]:
    return WAYS[request.param]


# -------------------------------------------------------------------- what is admitted


def test_what_sentence_transformers_saves_is_admitted(owners: Owners, pico: Any) -> None:
    package = owners.packages["yan"]
    card = read_package(package)
    assert (card.kind, card.layers, card.rank) == ("retriever", (0, 1, 2, 3), None)
    assert tuple(entry.path for entry in card.files if entry.path != "routing.safetensors") == FILES
    # saving has changed the tokenizer's file, though not its tokens
    own, base = ((folder / "tokenizer.json").read_bytes() for folder in (package, pico.embedder()))
    assert own == (owners.raw["yan"] / "tokenizer.json").read_bytes()
    assert own != base
    raw, packed = load_file(owners.raw["yan"] / "model.safetensors"), load_file(package / "model.safetensors")
    assert list(raw) == list(packed)
    assert all(torch.equal(raw[name], packed[name]) for name in raw)
    text = "".join(
        (package / name).read_text() for name in ("config.json", "tokenizer_config.json", CARD_FILE)
    )
    assert str(pico.root) not in text
    summary = check_expert(package, card, pico.embedder_description())
    assert (summary.dtype, summary.parameters) == ("F32", sum(t.numel() for t in raw.values()))


def _json(name: str, **change: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(data | change))

    return write


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors"
        )

    return write


def _vocabulary(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["ba"], vocabulary["be"] = vocabulary["be"], vocabulary["ba"]
    (folder / "tokenizer.json").write_text(json.dumps(data))


QUERY = "encoder.layer.1.attention.self.query.weight"
CHECKPOINT = (
    "The checkpoint in '{raw}' does not hold exactly the base's tensors, all of one dtype out of F32:\n  - "
)
OTHERWISE = "fine-tune the base itself; if it is the same, save both with the same version of transformers"
VECTORS = (
    "The query encoder in '{raw}' makes other vectors than the base 'embedder', which encodes the documents:"
    "\n  - "
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _tensors(lambda t: t.update({"lm_head.weight": torch.zeros(2, 2)})),
            CHECKPOINT + "tensor 'lm_head.weight': F32 (2, 2) found, not allowed here",
        ),
        (
            _tensors(lambda t: t.pop(QUERY)),
            CHECKPOINT + f"tensor '{QUERY}': missing, F32 (32, 32) expected",
        ),
        (
            _tensors(lambda t: t.update({QUERY: torch.zeros(32, 31)})),
            CHECKPOINT + f"tensor '{QUERY}': F32 (32, 31) found, F32 (32, 32) expected",
        ),
        (
            _tensors(lambda t: t.update({QUERY: t[QUERY].bfloat16()})),
            CHECKPOINT + f"tensor '{QUERY}': BF16 (32, 32) found, F32 (32, 32) expected",
        ),
        (
            _tensors(lambda t: t[QUERY].mul_(float("nan"))),
            "model.safetensors of expert 'yan/whole' holds values that are not allowed:\n  - tensor "
            f"'{QUERY}': 1,024 of 1,024 values are NaN or infinite; all must be finite",
        ),
        (  # shapes would not tell
            _json("config.json", num_attention_heads=2),
            "config.json is not the base encoder's:\n  - num_attention_heads: the expert has 2, the base 4; "
            + OTHERWISE,
        ),
        (
            _json("config.json", auto_map={"AutoModel": "evil.Model"}),
            "config.json is not the base encoder's:\n  - auto_map: names code, which is never run; remove it",
        ),
        (
            _json("config.json", architectures=["../Model"]),
            "config.json is not the base encoder's:\n  - architectures: ['../Model'] found; a list of class names is "
            "needed",
        ),
        (
            _json("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
            "tokenizer_config.json is not allowed:\n  - auto_map: names code, which is never run; remove it",
        ),
        (
            _json(
                "tokenizer_config.json", pad_token={"content": "[PAD]", "__type": "Evil"}, do_lower_case="yes"
            ),
            "tokenizer_config.json is not allowed:\n  - do_lower_case: 'yes' is not what it may be\n  - pad_token: "
            "{'content': '[PAD]', '__type': 'Evil'} is not what it may be",
        ),
        (
            _json("sentence_bert_config.json", max_seq_length=32),
            VECTORS + "max_seq_length: 64 in the base, 32 in 'raw'",
        ),
        (
            _json("1_Pooling/config.json", pooling_mode="cls"),
            VECTORS + "pooling: 'mean' in the base, 'cls' in 'raw'",
        ),
        (
            _json("config_sentence_transformers.json", prompts={"query": "query: "}),
            VECTORS + "prompts: {} in the base, {'query': 'query: '} in 'raw'",
        ),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            "'{raw}' cannot be packed:\n  - tokenizer.json: missing",
        ),
        (
            lambda folder: (folder / "modeling.py").write_text("evil"),
            "'{raw}' cannot be packed:\n  - modeling.py: a regular file that is no part of a retriever expert; remove "
            "it",
        ),
        (
            lambda folder: (folder / "more").mkdir(),
            "'{raw}' cannot be packed:\n  - more: a folder that is no part of a retriever expert; remove it",
        ),
    ],
)
def test_what_is_not_the_bases_is_refused(
    owners: Owners, pico: Any, change: Callable[[Path], None], message: str
) -> None:
    raw = shutil.copytree(owners.raw["yan"], pico.scratch("raw"))
    change(raw)
    with pytest.raises(AdmissionError) as caught:
        pico.pack_retriever(raw, name="yan/whole")
    assert str(caught.value) == message.replace("{raw}", str(raw))


def test_a_tokenizer_with_other_tokens_is_refused(owners: Owners, pico: Any) -> None:
    raw = shutil.copytree(owners.raw["yan"], pico.scratch("raw"))
    _vocabulary(raw)
    with pytest.raises(AdmissionError) as caught:
        pico.pack_retriever(raw, name="yan/whole")
    assert str(caught.value).startswith(
        "tokenizer.json makes other tokens than that of the base 'embedder' (digest "
    )
    assert str(caught.value).endswith(
        f", the base's {pico.embedder_description().tokens}). One tokenization serves all experts of a composition: "
        "train the query encoder with the base's tokenizer."
    )


def test_a_base_described_without_its_tokens_asks_for_the_very_file(owners: Owners, pico: Any) -> None:
    from dataclasses import replace

    card = read_package(owners.packages["yan"])
    older = replace(pico.embedder_description(), tokens=None)
    with pytest.raises(AdmissionError, match=r"the base's unknown: the very file is needed\)"):
        check_expert(owners.packages["yan"], card, older)
    package = repacked(
        owners.packages["yan"], pico, "tokenizer.json", (pico.embedder() / "tokenizer.json").read_bytes()
    )
    assert check_expert(package, read_package(package), older).kind == "retriever"


def test_the_files_of_both_forms_are_refused(owners: Owners, pico: Any) -> None:
    raw = shutil.copytree(owners.raw["yan"], pico.scratch("raw"))
    adapter = pico.write_retriever(pico.scratch("adapter"), seed=1)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(adapter / name, raw / name)
    with pytest.raises(AdmissionError) as caught:
        pico.pack_retriever(raw, name="yan/whole")
    assert str(caught.value) == (
        "A retriever is either an adapter (adapter_config.json, adapter_model.safetensors) or a whole query encoder "
        f"({', '.join(FILES)}); files of both are here. Keep those of one."
    )


def repacked(package: Path, pico: Any, name: str, data: bytes) -> Path:
    """A package whose card vouches for another content of a file: the owner is hostile, not careless."""
    folder: Path = shutil.copytree(package, pico.scratch("package"))
    (folder / name).write_bytes(data)
    card = read_package(package)
    files = [
        FileEntry(path=name, size=len(data), sha256=hashlib.sha256(data).hexdigest()) if f.path == name else f
        for f in card.files
    ]
    files += (
        []
        if any(f.path == name for f in files)
        else [FileEntry(path=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())]
    )
    changed = ExpertCard.create(
        **{
            **card.model_dump(mode="json"),
            "version": 2,
            "files": [f.model_dump() for f in sorted(files, key=lambda f: f.path)],
        }
    )
    (folder / CARD_FILE).write_bytes(changed.to_bytes())
    return folder


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        (
            "config.json",
            {"_name_or_path": "/home/yan"},
            "_name_or_path",
        ),
        (
            "config.json",
            {"_attn_implementation": "evil"},
            "_attn_implementation",
        ),
        (
            "tokenizer_config.json",
            {"name_or_path": "/home/yan"},
            "name_or_path: says where the tokenizer came from; pack the expert again",
        ),
        (
            "tokenizer_config.json",
            {"model_max_length": 16},
            "model_max_length is 16; the base reads 64 tokens, and fewer would cut queries off earlier",
        ),
    ],
)
def test_a_package_made_by_hand_is_checked_as_strictly(
    owners: Owners, pico: Any, name: str, change: dict[str, Any], problem: str
) -> None:
    held = json.loads((owners.packages["yan"] / name).read_text())
    package = repacked(owners.packages["yan"], pico, name, json.dumps(held | change).encode())
    with pytest.raises(AdmissionError) as caught:
        owners.registry.register(package)
    assert caught.value.problems == (problem,)


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "vocab.txt", "modeling_bert.py", "pytorch_model.bin"]
)
def test_a_file_that_is_not_listed_is_refused_by_name(owners: Owners, pico: Any, name: str) -> None:
    package = repacked(owners.packages["yan"], pico, name, b"{}")
    with pytest.raises(AdmissionError) as caught:
        owners.registry.register(package)
    assert caught.value.problems == (f"{name}: not a file of a retriever expert",)


def test_the_base_itself_is_packed_with_a_remark(pico: Any) -> None:
    raw = shutil.copytree(pico.embedder(), pico.scratch("raw"))
    with pytest.warns(ExpertWarning, match="every tensor in .* is byte for byte the base's"):
        pico.pack_retriever(raw, name="yan/whole")


# -------------------------------------------------------------------- how it answers


def test_documents_stay_the_bases_and_a_query_is_its_owners_own_models(
    owners: Owners, retrievers: Any, way: dict[str, Any], texts: list[str]
) -> None:
    model = owners.model(**way)
    assert np.array_equal(model.encode_document(texts), retrievers.stock().encode_document(texts))
    for owner in ("vic", "yan"):
        others = {"acme", "vic", "yan"} - {owner}
        assert np.array_equal(
            model.encode_query(texts, opt_out=others), owners.alone(owner).encode_query(texts)
        )
    assert not np.allclose(owners.alone("vic").encode_query(texts), owners.alone("yan").encode_query(texts))


def test_queries_are_the_weighted_sum_of_the_experts_embeddings(
    owners: Owners, way: dict[str, Any], texts: list[str]
) -> None:
    """Each whole encoder's embedding is the stock class's; adapters are compared with PEFT in test_stacked."""
    model = owners.model(**way)
    weights = np.stack(
        [item["route_weights"].numpy() for item in model.encode_query(texts, output_value=None)]
    )
    each = [
        model.encode_query(texts, opt_out={"acme", "vic", "yan"}),
        model.encode_query(texts, opt_out={"vic", "yan"}),
        owners.alone("vic").encode_query(texts),
        owners.alone("yan").encode_query(texts),
    ]
    fused = np.einsum("qe,eqd->qd", weights, np.stack(each))
    fused /= np.linalg.norm(fused, axis=1, keepdims=True)
    assert np.abs(model.encode_query(texts) - fused).max() < 1e-5
    assert (weights[:, 1:] > 0).any(axis=0).all()  # everybody answers somewhere


def test_routed_on_token_embeddings(owners: Owners, pico: Any, texts: list[str]) -> None:
    """Where the choice is made before any layer runs, a whole encoder that answers runs alone."""
    model = owners.model(selector="top1")
    engine = model[0].model.engine
    rows: list[int] = []
    handle = (
        model[0]
        .model.base.encoder.layer[0]
        .register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    )
    entries = {slot: [i for i in range(len(texts)) if i % 3 == slot - 1] for slot in (1, 2, 3)}
    from composer.retrieval.engine import _Entries

    features = model[0].preprocess(texts)
    inputs = {name: features[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    wanted = _Entries(np.arange(len(texts)), np.array([1 + i % 3 for i in range(len(texts))]))
    with torch.no_grad():
        output = engine._answered(inputs, wanted, lambda rest: engine._repeated(inputs, rest, share=False))
    handle.remove()
    assert sum(rows) == len(entries[1])
    for slot, owner in ((2, "vic"), (3, "yan")):
        mine = entries[slot]
        picked = {name: value[mine] for name, value in inputs.items()}
        with torch.no_grad():
            expected = owners.alone(owner)[0].auto_model(**picked).last_hidden_state
        assert torch.equal(output.last_hidden_state[mine], expected)


def test_the_stock_class_loads_the_folder(owners: Owners, texts: list[str]) -> None:
    from sentence_transformers import SentenceTransformer

    import composer.hf  # noqa: F401

    stock = SentenceTransformer(str(owners.folder()), device="cpu", local_files_only=True)
    assert np.array_equal(stock.encode_query(texts), owners.model().encode_query(texts))


def test_a_model_of_another_process_encodes_alike(owners: Owners, texts: list[str]) -> None:
    sent = ForkingPickler.loads(bytes(ForkingPickler.dumps(copy.copy(owners.model()))))
    assert np.array_equal(sent.encode_query(texts), owners.model().encode_query(texts))


def test_a_state_of_the_lower_layers_is_of_no_use_to_it(owners: Owners, retrievers: Any) -> None:
    with pytest.raises(PlanError) as caught:
        plan(retrievers.manifest(EXPERTS, selector="top1", route_on="layer_state"), owners.registry)
    assert str(caught.value) == (
        "Manifest 'pico' cannot be composed:\n"
        + "\n".join(
            f"  - {name} is a whole query encoder: it shares no lower layers with the base, which `route_on: "
            "layer_state` goes on from; route on the embedding, or leave it out"
            for name in ("vic/whole", "yan/whole")
        )
    )


def test_threads_do_not_see_each_others_owners(owners: Owners, texts: list[str]) -> None:
    model = owners.model(selector="top1")
    sets: list[set[str]] = [{"acme", "yan"}, {"vic"}]
    expected = [model.encode_query(texts[:4], opt_out=one) for one in sets]
    wrong = [0, 0]

    def work(number: int) -> None:
        for _ in range(10):
            found = model.encode_query(texts[:4], opt_out=sets[number])
            wrong[number] += not np.array_equal(found, expected[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0, 0]


# -------------------------------------------------------------------- leaving


@pytest.mark.parametrize("gone", [{"yan"}, {"acme"}, {"vic", "yan"}], ids=lambda gone: "+".join(sorted(gone)))
def test_r2_a_request_is_the_never_joined_model_bit_for_bit(
    owners: Owners, way: dict[str, Any], gone: set[str], texts: list[str]
) -> None:
    never = owners.model([e for e in EXPERTS if e.partition("/")[0] not in gone], **way)
    left = owners.model(**way).encode_query(texts, opt_out=gone)
    assert np.array_equal(left, never.encode_query(texts))
    assert not np.array_equal(left, owners.model(**way).encode_query(texts))


def test_r2_everybody_out_is_the_base(
    owners: Owners, retrievers: Any, way: dict[str, Any], texts: list[str]
) -> None:
    left = owners.model(**way).encode_query(texts, opt_out={"acme", "vic", "yan"})
    assert np.array_equal(left, retrievers.stock().encode_query(texts))


def test_every_door_is_proved_bit_for_bit(owners: Owners, texts: list[str]) -> None:
    rows = verify_optout(owners.folder(), owner="yan", prompts=texts)
    assert [(row.door, row.passed, row.bit_identical) for row in rows] == [
        (door, True, True) for door in ("build", "load", "request")
    ]


def test_r5_its_files_are_not_needed_and_it_is_never_called(
    owners: Owners, pico: Any, way: dict[str, Any], texts: list[str]
) -> None:
    folder = shutil.copytree(owners.folder(**way), pico.scratch("copy"))
    [yan] = [e for e in Lock.read(folder).experts if e.owner == "yan"]
    shutil.rmtree(folder / yan.folder)
    left = owners.model(**way).encode_query(texts, opt_out={"yan"})
    assert np.array_equal(load(folder, opt_out={"yan"}).encode_query(texts), left)
    encoder = owners.model(**way)[0].model.whole["3"]
    calls: list[int] = []
    handle = encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        owners.model(**way).encode_query(texts, opt_out={"yan"})
        owners.model(**way).encode_document(texts)
        assert calls == []
        owners.model(**way).encode_query(texts)  # the control
        assert calls
    finally:
        handle.remove()


def test_r7_rows_with_sets_of_their_own(owners: Owners, way: dict[str, Any], texts: list[str]) -> None:
    sets: list[set[str]] = [{"yan"}, set(), {"acme", "vic"}, {"acme", "vic", "yan"}] * 3
    model = owners.model(**way)
    together = model.encode_query(texts, opt_out=sets, output_value=None)
    for text, one, item in zip(texts, sets, together, strict=True):
        alone = model.encode_query(text, opt_out=one, output_value=None)
        assert item["expert"] == alone["expert"]
        assert torch.dist(item["sentence_embedding"], alone["sentence_embedding"]) < 1e-5


def _tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("composition.json", "manifest.yaml")
    }


def test_r3_r4_taken_out_put_in_and_saved(owners: Owners, pico: Any, texts: list[str]) -> None:
    folder = shutil.copytree(owners.folder(), pico.scratch("edited"))
    remove_experts(folder, ["yan"])
    assert _tree(folder) == _tree(owners.folder(EXPERTS[:2]))
    assert not any("yan/" in path.read_text() for path in folder.glob("*.json"))
    digest = owners.registry.expert("yan/whole").digest
    assert not any(digest in path.name for path in folder.rglob("*"))
    add_experts(folder, ["yan/whole"], registry=owners.registry)
    assert _tree(folder) == _tree(owners.folder())
    saved = pico.scratch("saved")
    load(folder, opt_out={"vic"}).save_pretrained(str(saved))
    assert Lock.read(saved).owners == ("acme", "yan")
    assert np.array_equal(
        load(saved).encode_query(texts), owners.model().encode_query(texts, opt_out={"vic"})
    )


def test_a_changed_weight_is_not_saved(owners: Owners, pico: Any) -> None:
    model = load(owners.folder())
    next(model[0].model.whole["3"].parameters()).data += 1
    with pytest.raises(BuildError, match=r"was changed after loading, so it is no owner's published weight"):
        model.save_pretrained(str(pico.scratch("saved")))


def test_a_file_with_other_tensors_is_never_loaded(owners: Owners, pico: Any) -> None:
    """The registry has looked already; the folder may have been changed since."""
    folder = shutil.copytree(owners.folder(), pico.scratch("changed"))
    [yan] = [e for e in Lock.read(folder).experts if e.owner == "yan"]
    path = folder / yan.folder / "model.safetensors"
    data = path.read_bytes().replace(b"pooler.dense.bias", b"kooler.dense.bias")
    path.unlink()  # a link to the registry's own file
    path.write_bytes(data)
    with pytest.raises(BuildError) as caught:
        load(folder)
    assert caught.value.problems == ("kooler.dense.bias", "pooler.dense.bias")


# -------------------------------------------------------------------- the command line


def test_register_show_plan_and_build(
    owners: Owners, pico: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from pipelines.cli.app import app

    monkeypatch.chdir(tmp_path)
    registry = shutil.copytree(pico.retriever_library().path, tmp_path / "registry")
    queries = [json.dumps({"text": text}) for text in pico.domain_texts(3, count=90)]
    (tmp_path / "own.jsonl").write_text("\n".join(queries) + "\n")
    manifest = owners.retrievers.manifest(["acme/search", "wes/whole"], selector="top1").to_dict()
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(manifest))

    def run(*words: str) -> str:
        done = CliRunner().invoke(app, ["--registry", str(registry), *words], env={"COLUMNS": "120"})
        assert done.exit_code == 0, done.output
        return done.stdout

    options = ("--name", "wes/whole", "--domain", "words", "--license", "MIT", "--text", "own.jsonl")
    said = run("register", str(owners.raw["vic"]), *options)
    assert said.startswith("Registered wes/whole@1: words, retriever, MIT, 46.2 k parameters, ")
    assert "tokenizer.json" in run("show", "wes/whole", "--json")
    assert "router:        lda on the embedding, top1\n" in run("plan", "m.yaml")
    run("build", "m.yaml", "out")
    texts = pico.domain_texts(3, count=3)
    left = load(tmp_path / "out", opt_out={"acme"})
    assert np.array_equal(left.encode_query(texts), owners.alone("vic").encode_query(texts))
