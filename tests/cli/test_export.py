"""coterie export: what it says, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def full(pico: Any) -> Path:
    """A composition on Qwen3, whose stock class may keep layers without experts."""
    return pico.composed(
        "stacked",
        family="qwen3",
        experts=["bob/full"],
        scorer="learned",
        context="token",
        options={"bias": False},
    )


def test_export_writes_a_checkpoint(run: Any, full: Path, tmp_path: Path) -> None:
    result = run("export", full, tmp_path / "stock", "--to", "qwen3_moe")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(
        f"Wrote {tmp_path / 'stock'}: Qwen3MoeForCausalLM with 1 experts beside the base qwen3, "
    )
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["mlp_only_layers"] == [0, 1]


def test_dry_run_writes_nothing(run: Any, full: Path, tmp_path: Path) -> None:
    result = run("export", full, tmp_path / "stock", "--to", "qwen3_moe", "--dry-run", "--json")
    assert result.code == 0, result.err
    assert list(tmp_path.iterdir()) == []
    assert result.json["experts"] == [{"index": 1, "name": "bob/full", "owner": "bob"}]
    assert result.json["settings"] == {
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "moe_intermediate_size": 48,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0, 1],
    }
    shown = run("export", full, tmp_path / "stock", "--to", "qwen3_moe", "--dry-run").out
    assert "Qwen3MoeForCausalLM" in shown
    assert "bob/full" in shown


def test_refusal_exits_with_2(run: Any, pico: Any, tmp_path: Path) -> None:
    folder = pico.composed("low_rank", scorer="learned")
    result = run("export", folder, tmp_path / "stock", "--to", "mixtral")
    assert result.code == 2
    assert result.err.startswith(
        f"Error: {folder} is not exactly a Mixtral model:\n  - the context 'running_mean' "
    )
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_refused(run: Any, full: Path, tmp_path: Path) -> None:
    result = run("export", full, tmp_path, "--to", "qwen3_moe")
    assert (result.code, result.err) == (
        2,
        f"Error: The output folder {tmp_path} exists. Choose another name, or remove it first.\n",
    )


def test_import_prints_what_to_do_and_it_works(run: Any, tmp_path: Path) -> None:
    """Out of the stock checkpoint, into a registry, and composed again, by the commands that are printed."""
    folder = flex(tmp_path / "flex")
    result = run("import", folder, tmp_path / "owners.yaml", "--out", tmp_path / "in")
    assert (result.code, result.err) == (
        2,
        f"Error: There is no owners file at {tmp_path / 'owners.yaml'}.\n",
    )
    (tmp_path / "owners.yaml").write_text(
        "base: anchor\nexperts:\n- {name: zoe/ffn, domain: law, license: MIT}\n"
        "- {name: bob/ffn, domain: code, license: MIT}\n"
    )
    result = run("import", folder, tmp_path / "owners.yaml", "--out", tmp_path / "in")
    assert result.code == 0, result.err
    assert result.err == (
        "Note: compositions sort experts by name, so an export will not have them in this checkpoint's order.\n"
    )
    first, *commands = result.out.splitlines()
    assert first == f"Wrote {tmp_path / 'in'}: the base anchor and 2 experts. To compose them:"
    for command in commands:
        words = command.replace(" composed", f" {tmp_path / 'composed'}").split()
        assert words[0] == "coterie"
        done = run(*words[1:], registry=tmp_path / "registry")
        assert done.code == 0, done.err
    out = run("export", tmp_path / "composed", tmp_path / "again", "--to", "flex_olmo")
    assert out.code == 0, out.err


def flex(folder: Path) -> Path:
    """A FlexOlmo of three experts, as transformers saves it."""
    from transformers import FlexOlmoConfig, FlexOlmoForCausalLM

    config = FlexOlmoConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=97,
        num_experts=3,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=0,
    )
    FlexOlmoForCausalLM(config).save_pretrained(folder)
    return folder
