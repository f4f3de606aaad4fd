"""Dropping the biases: measured against the composition that never used them, and said in the card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BIASED = ("acme/biased", "bob/full")
TEXT = "and the clocks were striking, cold in April. " * 40


def test_cost_is_that_of_the_composition_without_biases(stock: Any) -> None:
    from transformers import AutoTokenizer

    from composer.loading import load
    from pipelines.calibration import bias_cost
    from pipelines.evaluate import evaluate

    with_bias, without = (
        stock.composed("llama", BIASED, top_k=1),
        stock.composed("llama", BIASED, top_k=1, options={"bias": False}),
    )
    tokenizer = AutoTokenizer.from_pretrained(with_bias)
    size = {"sequence_length": 32, "max_tokens": 256}
    model = load(with_bias)
    cost = bias_cost(model, tokenizer, {"law": [TEXT]}, **size)["law"]
    expected = [
        evaluate(other, tokenizer, {"law": [TEXT]}, **size).domains["law"].nll
        for other in (load(with_bias), load(without), model)
    ]
    assert [cost.nll, cost.nll_without_bias] == pytest.approx(expected[:2], abs=1e-6)
    assert abs(cost.change) > 1e-4
    assert expected[2] == pytest.approx(cost.nll, abs=1e-6), "the model has its biases back"


def test_export_without_biases_is_the_composition_without_them(stock: Any, pico: Any) -> None:
    from composer.export.exporting import export, plan_export

    planned = plan_export(stock.composed("llama", BIASED), "mixtral", drop_bias=True)
    assert planned.dropped == ("acme/biased has a negative router bias (-1)",)
    out = export(planned, pico.scratch("dropped"), notes=["measured on law: 1 with the biases, 2 without"])
    other = stock.export(stock.composed("llama", BIASED, options={"bias": False}), "mixtral")
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    card = (out / "README.md").read_text()
    assert (
        "- acme/biased has a negative router bias (-1): dropped, so the logits are not the composition's"
        in card
    )
    assert "- measured on law: 1 with the biases, 2 without" in card
    assert "dropped" not in (other / "README.md").read_text()


def test_command_measures_then_writes(stock: Any, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from pipelines.cli.app import app

    def run(*words: object) -> Any:
        return CliRunner().invoke(app, ["export", *map(str, words)], prog_name="coterie")

    law = tmp_path / "law.txt"
    law.write_text(TEXT)
    folder = stock.composed("olmo2", BIASED)
    result = run(
        folder, tmp_path / "out", "--to", "flex_olmo", "--calibrate", "--data", f"law={law}", "--json"
    )
    assert result.exit_code == 0, result.stderr
    cost = json.loads(result.stdout)["calibration"]["law"]
    assert cost["change"] == pytest.approx(cost["nll_without_bias"] - cost["nll"])
    assert (
        f"- measured on law: {cost['nll']:.4f} nats per token with the biases, {cost['nll_without_bias']:.4f} without"
        in (tmp_path / "out" / "README.md").read_text()
    )
    result = run(folder, tmp_path / "other", "--to", "flex_olmo", "--calibrate")
    assert (result.exit_code, result.stderr) == (
        2,
        "Error: --calibrate and --data DOMAIN=FILE go together: the cost is measured on that text.\n",
    )
    assert not (tmp_path / "other").exists()
    plain = stock.composed("olmo2")
    result = run(
        plain, tmp_path / "p", "--to", "flex_olmo", "--calibrate", "--data", f"law={law}", "--dry-run"
    )
    assert result.exit_code == 0, result.stderr
    assert result.stderr == "Note: there is no router bias to drop, so --calibrate changes nothing.\n"
