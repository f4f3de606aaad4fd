"""FlexOlmo checkpoints: taken apart and put together again bit for bit; damaged ones refused."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

MANY = 12


@pytest.fixture(scope="module")
def flex(pico: Any) -> Callable[..., Path]:
    """A checkpoint that transformers itself saved: ``flex(n=12, fused=True, dtype="bfloat16")``; shared."""

    def save(n: int, fused: bool, dtype: str) -> Path:
        import torch
        from transformers import AutoTokenizer, FlexOlmoConfig, FlexOlmoForCausalLM

        config = FlexOlmoConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=pico.vocabulary,
            max_position_embeddings=128,
            num_experts=n,
            num_experts_per_tok=min(n, 3),
            rope_parameters={"rope_type": "default", "rope_theta": 777.0},
            pad_token_id=0,
            eos_token_id=0,
        )
        torch.manual_seed(n)
        model = FlexOlmoForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "experts" in name or "gate" in name:
                    parameter.normal_(std=0.2)  # the class starts with gates of zeros
        folder = pico.scratch("flex")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.to(getattr(torch, dtype)).save_pretrained(folder, save_original_format=not fused)
            AutoTokenizer.from_pretrained(pico.base("olmo2")).save_pretrained(folder)
        return folder

    def get(*, n: int = 4, fused: bool = False, dtype: str = "float32") -> Path:
        return pico.once(lambda: save(n, fused, dtype), "flex", n, fused, dtype)

    return get


def owners(n: int) -> Any:
    from composer.export.owners import OwnersFile

    # two digits, so that the canonical order by name is the checkpoint's
    experts = [{"name": f"owner-{i:02}/ffn", "domain": f"d{i}", "license": "Apache-2.0"} for i in range(1, n)]
    return OwnersFile.model_validate({"base": "anchor", "experts": tuple(experts)})


def take_apart(folder: Path, n: int, pico: Any) -> Path:
    from composer.export.importing import import_checkpoint

    return import_checkpoint(folder, owners(n), pico.scratch("imported")).out


def compose(imported: Path, pico: Any) -> Path:
    """Do what the command prints: register everything, build the manifest."""
    from composer.building import build
    from composer.manifest import Manifest
    from composer.planning import plan
    from experts.routing_artifacts import RoutingInfo
    from registry import Registry

    empty = pico.once(pico._empty_registry, "empty")
    registry = Registry(shutil.copytree(empty, pico.scratch("registry")))
    registry.add_base(imported / "base", name="anchor")
    info = RoutingInfo.model_validate_json((imported / "public-routing" / "routing.json").read_text())
    registry.set_base_routing("anchor", imported / "public-routing", info)
    for card in sorted(imported.glob("experts/*/*/card.json")):
        registry.register(card.parent)
    manifest = Manifest.from_file(imported / "manifest.yaml")
    return build(plan(manifest, registry), pico.scratch("out"), registry=registry)


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


@pytest.mark.parametrize(
    ("n", "fused", "dtype"), [(MANY, False, "float32"), (MANY, True, "bfloat16"), (3, False, "bfloat16")]
)
def test_round_trip_is_bit_equal(
    n: int, fused: bool, dtype: str, flex: Callable[..., Path], pico: Any, stock: Any
) -> None:
    """F11, with more than ten experts: numbered, not sorted as text."""
    import torch

    composed = compose(take_apart(flex(n=n, fused=fused, dtype=dtype), n, pico), pico)
    again = stock.export(composed, "flex_olmo")
    before, after = tensors(flex(n=n, dtype=dtype)), tensors(again)
    assert before.keys() == after.keys()
    assert all(
        before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before
    )
    # the same logits at all three stations
    ids = pico.prompts(rows=2)
    theirs = stock.stock_logits(flex(n=n, fused=fused, dtype=dtype), ids)
    assert torch.equal(theirs, stock.stock_logits(again, ids))
    if dtype == "float32":
        torch.testing.assert_close(stock.logits(composed, ids), theirs, rtol=0, atol=1e-5)


def test_base_is_the_dense_model_of_expert_0(flex: Callable[..., Path], pico: Any, stock: Any) -> None:
    """A FlexOlmo that always takes expert 0 is the imported base."""
    import torch
    from safetensors.torch import save_file

    imported = take_apart(flex(), 4, pico)
    only = pico.scratch("only")
    shutil.copytree(flex(), only)
    kept = {n: t for n, t in tensors(flex()).items() if not re.search(r"experts\.[123]\.", n)}
    kept = {n: t[:1].clone() if n.endswith("gate.weight") else t for n, t in kept.items()}
    save_file(kept, only / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((only / "config.json").read_text()) | {"num_experts": 1, "num_experts_per_tok": 1}
    (only / "config.json").write_text(json.dumps(config))
    ids = pico.prompts(rows=2)
    torch.testing.assert_close(
        stock.stock_logits(imported / "base", ids), stock.stock_logits(only, ids), rtol=0, atol=1e-6
    )
    assert (
        json.loads((imported / "base" / "config.json").read_text())["rope_parameters"]["rope_theta"] == 777.0
    )


def test_cards_say_whose_they_are(flex: Callable[..., Path], pico: Any) -> None:
    from experts.package import read_package

    card = read_package(take_apart(flex(), 4, pico) / "experts" / "owner-02" / "ffn")
    assert (card.owner, card.domain, card.license, card.kind) == ("owner-02", "d2", "Apache-2.0", "ffn")
    assert card.routing is not None
    assert card.routing.rows is not None
    assert (card.routing.rows.layers, card.routing.rows.has_bias, card.training.method) == (
        (0, 1),
        False,
        "imported",
    )


def test_leaving_an_imported_owner_out(flex: Callable[..., Path], pico: Any, stock: Any) -> None:
    """Expert 2's matrices and gate row are gone, and the others moved up."""
    import torch

    composed = compose(take_apart(flex(), 4, pico), pico)
    found = tensors(stock.export(composed, "flex_olmo", opt_out={"owner-02"}))
    before = tensors(flex())
    gate = "model.layers.1.mlp.gate.weight"
    assert torch.equal(found[gate], before[gate][[0, 1, 3]])
    prefix = "model.layers.1.mlp.experts"
    assert torch.equal(found[f"{prefix}.2.up_proj.weight"], before[f"{prefix}.3.up_proj.weight"])
    assert f"{prefix}.3.up_proj.weight" not in found


def test_owners_file_of_an_export_imports_it(stock: Any, pico: Any) -> None:
    from composer.export.importing import import_checkpoint
    from composer.export.owners import OwnersFile

    out = stock.export(stock.composed("olmo2"), "flex_olmo")
    done = import_checkpoint(out, OwnersFile.from_file(out / "owners.yaml"), pico.scratch("again"))
    assert (done.base, done.experts, done.in_canonical_order) == ("olmo2", stock.full, True)
    before, after = tensors(pico.base("olmo2")), tensors(done.out / "base")
    assert all((before[name] == after[name]).all() for name in before)


def damaged(folder: Path, pico: Any, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint whose tensors and configuration ``change`` was let at."""
    from safetensors.torch import save_file

    copy = pico.scratch("damaged")
    shutil.copytree(folder, copy)
    held, config = tensors(copy), json.loads((copy / "config.json").read_text())
    change(held, config)
    save_file(held, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def without_expert_2(held: dict[str, Any], config: dict[str, Any]) -> None:
    """What transformers loads without a word: expert 3 becomes expert 2."""
    for name in list(held):
        if ".experts.2." in name:
            del held[name]
        elif name.endswith("gate.weight"):
            held[name] = held[name][[0, 1, 3]].clone()
    config["num_experts"] = 3


def with_bias(held: dict[str, Any], config: dict[str, Any]) -> None:
    held["model.layers.0.mlp.gate.bias"] = held["model.norm.weight"][:4].clone()
    held["model.layers.1.mlp.gate.bias"] = held["model.norm.weight"][:4].clone()


def smaller(held: dict[str, Any], config: dict[str, Any]) -> None:
    config["num_experts"] = 3


def larger(held: dict[str, Any], config: dict[str, Any]) -> None:
    config["num_experts"] = 5


def hungry(held: dict[str, Any], config: dict[str, Any]) -> None:
    config["num_experts_per_tok"] = 5


def torn(held: dict[str, Any], config: dict[str, Any]) -> None:
    del held["model.layers.1.mlp.experts.3.up_proj.weight"]
    held["model.layers.1.mlp.shared.weight"] = held["model.norm.weight"].clone()


def short(held: dict[str, Any], config: dict[str, Any]) -> None:
    for name in list(held):
        if name.startswith("model.layers.1.mlp."):
            del held[name]


DAMAGE: dict[str, tuple[Callable[..., None], list[str]]] = {
    "a gap in the numbering": (
        without_expert_2,
        [
            "layers 0, 1: expert 2 is missing between 0 and 3, and transformers would load the ones after it under "
            "wrong numbers; renumber them, or take the whole checkpoint",
        ],
    ),
    "a gate's bias": (
        with_bias,
        [
            "model.layers.0.mlp.gate.bias and 1 more: transformers ignores a gate's bias, and the model was trained "
            "with it; import the rows by hand, with the bias in the owners' routing artefacts",
        ],
    ),
    "a configuration with fewer": (smaller, ["layers 0, 1: 4 experts, but config.json says 3"]),
    "a configuration with more": (larger, ["layers 0, 1: 4 experts, but config.json says 5"]),
    "more chosen than there are": (
        hungry,
        ["config.json: num_experts_per_tok is 5, but there are 4 experts"],
    ),
    "missing and foreign tensors": (
        torn,
        [
            "tensor 'model.layers.1.mlp.shared.weight' is not one of FlexOlmo's",
            "layer 1, expert 3: no up matrix",
        ],
    ),
    "a layer without experts": (
        short,
        ["layers 1 lack experts or a gate, or are not among the 2 of config.json"],
    ),
}


@pytest.mark.parametrize(("change", "problems"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint_is_refused(
    change: Callable[..., None],
    problems: list[str],
    flex: Callable[..., Path],
    pico: Any,
    message: Callable[..., str],
    tmp_path: Path,
) -> None:
    from composer.export.importing import import_checkpoint

    folder = damaged(flex(), pico, change)
    said = message(import_checkpoint, folder, owners(4), tmp_path / "out")
    assert said == "\n".join(
        [f"'{folder}' is not a whole FlexOlmo checkpoint:", *(f"  - {text}" for text in problems)]
    )
    assert list(tmp_path.iterdir()) == []


def test_transformers_is_silent_about_the_gap(flex: Callable[..., Path], pico: Any, stock: Any) -> None:
    """The control: what is refused here loads there, with every key in its place."""
    assert stock.stock_logits(damaged(flex(), pico, without_expert_2), pico.prompts(rows=1)).isfinite().all()


def test_other_models_and_other_numbers_of_owners(
    flex: Callable[..., Path], pico: Any, message: Callable[..., str], tmp_path: Path
) -> None:
    from composer.export.importing import import_checkpoint

    assert message(import_checkpoint, pico.base("olmo2"), owners(4), tmp_path / "out") == (
        f"'{pico.base('olmo2')}' holds a model of type 'olmo2'; only FlexOlmo checkpoints ('flex_olmo') can be "
        "imported."
    )
    assert message(import_checkpoint, flex(), owners(3), tmp_path / "out") == (
        f"The owners file names 2 experts, '{flex()}' holds 3 beside expert 0, which is the public base. Name experts "
        "1, 2, ... in order."
    )


def test_mistakes_in_the_owners_file(tmp_path: Path, message: Callable[..., str]) -> None:
    from composer.export.owners import OwnersFile

    path = tmp_path / "owners.yaml"
    path.write_text(
        "base: anchor\nowner: me\nexperts:\n  - {name: acme, domain: law, license: Apache-2.0}\n"
        "  - {name: bob/x, domain: code, license: Nonsense-1.0}\n"
    )
    assert message(OwnersFile.from_file, path) == (
        "owners file owners.yaml has 3 problems:\n"
        "  - experts.0.name: 'acme' is not an expert name: write owner/expert, for instance 'acme/contracts', each "
        "part 1 to 64 lower-case letters, digits, '_', '.' or '-', starting with a letter or digit.\n"
        "  - experts.1.license: 'Nonsense-1.0' is not an SPDX licence expression; write for instance 'Apache-2.0' or, "
        "for terms of your own, 'LicenseRef-<name>'. unknown licence 'Nonsense-1.0'\n"
        "  - owner: unknown key; Allowed: base, experts, format_version"
    )
    one = {"name": "bob/x", "domain": "code", "license": "MIT"}
    path.write_text(yaml.safe_dump({"base": "anchor", "experts": [one, dict(one)]}))
    assert message(OwnersFile.from_file, path) == (
        "owners file owners.yaml has 1 problem:\n"
        "  - experts: bob/x is listed more than once; every expert needs a name of its own"
    )
    path.write_text("base: anchor\nexperts: []\n")
    assert message(OwnersFile.from_file, path) == (
        "owners file owners.yaml has 1 problem:\n  - experts: name at least one expert"
    )
    assert (
        message(OwnersFile.from_file, tmp_path / "none") == f"There is no owners file at {tmp_path / 'none'}."
    )
