"""Stock checkpoints: the stock class computes what the composition computes, from the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FAMILIES = ("olmo2", "llama", "qwen3")


def header(folder: Path) -> dict[str, Any]:
    """All tensors of a checkpoint, by the reader that is under no suspicion."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize(
    ("family", "top_k"),
    [("olmo2", 1), ("olmo2", 4), ("llama", 2), ("qwen3", 2), ("mistral", 2), ("one_head", 2)],
)
def test_stock_class_gives_the_same_logits(family: str, top_k: int, stock: Any, pico: Any) -> None:
    import torch

    folder = stock.composed(family, top_k=top_k)
    ids = pico.prompts()
    found = stock.stock_logits(stock.export(folder, stock.targets[family]), ids)
    torch.testing.assert_close(found, stock.logits(folder, ids), rtol=0, atol=1e-5)
    assert (found - pico.dense(family)(ids).logits).abs().max() > 0.1, (
        "the control: the base answers otherwise"
    )


@pytest.mark.parametrize("family", ["olmo2", "qwen3", "one_head"])
def test_weights_that_do_not_sum_to_one_stay_so(family: str, stock: Any, pico: Any) -> None:
    import torch

    folder = stock.composed(family, top_k=2, normalize=False)
    out = stock.export(folder, stock.targets[family])
    assert json.loads((out / "config.json").read_text())["norm_topk_prob"] is False
    ids = pico.prompts()
    torch.testing.assert_close(stock.stock_logits(out, ids), stock.logits(folder, ids), rtol=0, atol=1e-5)


def test_mixtral_takes_unnormalised_weights_where_everybody_is_chosen(stock: Any, pico: Any) -> None:
    import torch

    folder = stock.composed("llama", top_k=4, normalize=False)
    out = stock.export(folder, "mixtral")
    assert json.loads((out / "config.json").read_text())["num_experts_per_tok"] == 4
    ids = pico.prompts()
    torch.testing.assert_close(stock.stock_logits(out, ids), stock.logits(folder, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_out_owner_is_not_in_the_checkpoint(family: str, stock: Any, pico: Any) -> None:
    """Byte for byte what a composition gives that the owner never joined; their files are not opened."""
    folder = pico.scratch("copy")
    shutil.copytree(stock.composed(family), folder)
    lock = json.loads((folder / "composition.json").read_text())
    bob = next(expert["digest"] for expert in lock["experts"] if expert["owner"] == "bob")
    shutil.rmtree(folder / "experts" / bob)
    out = stock.export(folder, stock.targets[family], opt_out={"bob"})
    never = stock.export(stock.composed(family, ("acme/full", "zoe/full")), stock.targets[family])
    for name in ("model.safetensors", "config.json", "owners.yaml"):
        assert (out / name).read_bytes() == (never / name).read_bytes()
    assert "bob" not in (out / "README.md").read_text()


def test_registry_counts_too(stock: Any) -> None:
    from composer.export.exporting import plan_export
    from registry import Registry

    copy = shutil.copytree(stock.library("llama").path, stock.pico.scratch("registry"))
    registry = Registry(copy)
    registry.opt_out("bob", reason="left")
    planned = plan_export(stock.composed("llama"), "mixtral", registry=registry)
    assert planned.left_out == ("bob",)
    assert [row["name"] for row in planned.to_dict()["experts"]] == ["acme/full", "zoe/full"]


@pytest.mark.parametrize("family", [*FAMILIES, "one_head"])
def test_file_is_what_the_stock_class_would_save(family: str, stock: Any) -> None:
    """Names, shapes and every bit, against ``save_pretrained`` of the loaded stock model."""
    import warnings

    import torch
    from transformers import AutoModelForCausalLM

    out = stock.export(stock.composed(family), stock.targets[family])
    again = stock.pico.scratch("saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoModelForCausalLM.from_pretrained(out, local_files_only=True).save_pretrained(again)
    ours, theirs = header(out), header(again)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    config, saved = (json.loads((folder / "config.json").read_text()) for folder in (out, again))
    assert {key: config.get(key) for key in saved} == saved


def test_anchor_comes_first_then_the_experts_by_name(stock: Any) -> None:
    import torch

    folder = stock.composed("llama", ("zoe/full", "acme/full", "bob/full"))
    tensors = header(stock.export(folder, "mixtral"))
    anchor = stock.pico.dense("llama").state_dict()
    prefix = "model.layers.2.block_sparse_moe.experts"
    assert torch.equal(tensors[f"{prefix}.0.w1.weight"], anchor["model.layers.2.mlp.gate_proj.weight"])
    assert torch.equal(tensors[f"{prefix}.0.w3.weight"], anchor["model.layers.2.mlp.up_proj.weight"])
    for index, name in enumerate(stock.full, start=1):
        package = header(expert_folder(folder, name))
        assert torch.equal(
            tensors[f"{prefix}.{index}.w2.weight"], package["model.layers.2.mlp.down_proj.weight"]
        )
        row = package["row.2.weight"]
        assert torch.equal(tensors["model.layers.2.block_sparse_moe.gate.weight"][index], row)


def expert_folder(folder: Path, name: str) -> Path:
    lock = json.loads((folder / "composition.json").read_text())
    return folder / "experts" / next(e["digest"] for e in lock["experts"] if e["name"] == name)


@pytest.mark.parametrize("family", FAMILIES)
def test_densified_low_rank_experts_compute_the_same(family: str, stock: Any, pico: Any) -> None:
    import torch

    folder = stock.composed(family, ("acme/low", "bob/full"))
    out = stock.export(folder, stock.targets[family], densify=True)
    ids = pico.prompts()
    torch.testing.assert_close(stock.stock_logits(out, ids), stock.logits(folder, ids), rtol=0, atol=1e-5)
    assert "- acme/low is low-rank (at most 2): written in full" in (out / "README.md").read_text()


@pytest.mark.parametrize("family", ["olmo2", "llama"])
def test_densified_layers_without_experts_compute_the_same(family: str, stock: Any, pico: Any) -> None:
    import torch

    folder = stock.composed(family, ("acme/some", "bob/some"))
    out = stock.export(folder, stock.targets[family], densify=True)
    ids = pico.prompts()
    torch.testing.assert_close(stock.stock_logits(out, ids), stock.logits(folder, ids), rtol=0, atol=1e-5)


def test_one_choice_makes_copies_of_the_anchor_exact(stock: Any, pico: Any) -> None:
    """Layers 0 and 3 lack one of two experts; the stock class may pick its copy of the anchor there."""
    import torch

    folder = stock.composed("llama", ("acme/some", "bob/full"), top_k=1)
    out = stock.export(folder, "mixtral", densify=True)
    ids = pico.prompts()
    torch.testing.assert_close(stock.stock_logits(out, ids), stock.logits(folder, ids), rtol=0, atol=1e-5)


def test_qwen3_moe_keeps_layers_without_experts(stock: Any, pico: Any) -> None:
    import torch

    folder = stock.composed("qwen3", ("acme/some", "bob/some"))
    out = stock.export(folder, "qwen3_moe")
    assert json.loads((out / "config.json").read_text())["mlp_only_layers"] == [0, 3]
    assert "model.layers.0.mlp.down_proj.weight" in header(out)
    ids = pico.prompts()
    torch.testing.assert_close(stock.stock_logits(out, ids), stock.logits(folder, ids), rtol=0, atol=1e-5)


def test_composition_in_another_dtype_is_written_in_it(stock: Any, pico: Any) -> None:
    import torch

    registry = stock.library("llama")
    manifest = pico.manifest(
        family="llama", experts=stock.full, dtype="bfloat16", scorer="learned", context="token"
    )
    folder = pico.compose(manifest, registry=registry)
    out = stock.export(folder, "mixtral")
    tensors = header(out)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    own = header(expert_folder(folder, "acme/full"))
    assert torch.equal(
        tensors["model.layers.1.block_sparse_moe.gate.weight"][1], own["row.1.weight"].bfloat16()
    )
    found = stock.stock_logits(out, pico.prompts())
    assert found.dtype == torch.bfloat16


def test_shards_and_index_load_the_same(stock: Any, pico: Any) -> None:
    import torch

    folder = stock.composed("olmo2")
    out = stock.export(folder, "flex_olmo", shard_bytes=40_000)
    assert len(list(out.glob("model-*.safetensors"))) > 3
    ids = pico.prompts()
    torch.testing.assert_close(stock.stock_logits(out, ids), stock.logits(folder, ids), rtol=0, atol=1e-5)


PROCESS = """
import json, sys
import torch, transformers
from safetensors.torch import save_file
ids, found = torch.tensor(json.loads(sys.argv[1])), {}
for architecture, folder in json.loads(sys.argv[2]).items():
    model = getattr(transformers, architecture).from_pretrained(folder).eval()
    with torch.no_grad():
        found[architecture] = model(ids).logits
save_file(found, sys.argv[3])
assert not {"composer", "experts"} & {name.partition(".")[0] for name in sys.modules}
"""


def test_checkpoints_need_nothing_of_ours(stock: Any, pico: Any, tmp_path: Path) -> None:
    """Every stock class, in a process that never imports a package of this project."""
    import torch
    from safetensors.torch import load_file

    from composer.export import TARGETS

    ids = pico.prompts(rows=2, length=9)
    exports, expected = {}, {}
    for family, target in stock.targets.items():
        folder = stock.composed(family)
        architecture = TARGETS.load(target).architecture
        exports[architecture] = str(stock.export(folder, target))
        expected[architecture] = stock.logits(folder, ids)
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, json.dumps(ids.tolist()), json.dumps(exports), str(tmp_path / "out")],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out")
    assert set(found) == {TARGETS.load(name).architecture for name in TARGETS}
    for architecture, logits in found.items():
        torch.testing.assert_close(logits, expected[architecture], rtol=0, atol=1e-5)


def test_tokenizer_travels_along(stock: Any) -> None:
    from transformers import AutoTokenizer

    folder = stock.composed("olmo2")
    out = stock.export(folder, "flex_olmo")
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert (out / "generation_config.json").is_file()
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"]


def test_tensor_that_does_not_reach_the_file_is_noticed(
    stock: Any, message: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from composer.export import shards

    whole = shards._header

    def renamed(entries: Any) -> bytes:
        return whole(entries).replace(b"embed_tokens", b"embed_tokenz")

    monkeypatch.setattr(shards, "_header", renamed)
    said = message(stock.export, stock.composed("olmo2"), "flex_olmo")
    assert said == (
        "model.safetensors does not hold what was written to it:\n"
        "  - tensor 'model.embed_tokenz.weight': F32 (97, 32) found, not allowed here; did you mean "
        "'model.embed_tokens.weight'?\n"
        "  - tensor 'model.embed_tokens.weight': missing, F32 (97, 32) expected"
    )


def test_nothing_is_left_of_a_failed_export(stock: Any, tmp_path: Path) -> None:
    from composer.export.exporting import export, plan_export

    planned = plan_export(stock.composed("olmo2"), "flex_olmo")

    def fail(_name: str, _size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(planned, tmp_path / "out", progress=fail)
    assert list(tmp_path.iterdir()) == []
