"""Manifests that no stock class holds, as coterie models: copies are the dense model, and every model can leave."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from composer.mergekit_moe.composed import compose_moe
from composer.mergekit_moe.manifest import parse
from experts.errors import AdmissionError, BuildError, PlanError

IDS = [[3, 5, 9, 17, 33, 65, 2, 4], [90, 80, 70, 60, 50, 40, 30, 20]]


def _logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS)).logits


@pytest.mark.parametrize(
    ("family", "model"),
    [("gemma3_text", {"head_dim": 8}), ("llama", {"attention_bias": True, "mlp_bias": True})],
    ids=["gemma", "biases"],
)
def test_copies_are_the_dense_model(family: str, model: Any, make_model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from composer import load

    base = make_model(family, **model)
    config = {
        "base_model": str(base),
        "gate_mode": "uniform_random",
        "experts": [{"source_model": str(base)}, {"source_model": str(base)}],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both are byte for byte the base
        names = compose_moe(parse(config), tmp_path / "out")
        dense = AutoModelForCausalLM.from_pretrained(base)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    difference = (_logits(load(tmp_path / "out")) - _logits(dense)).abs().max().item()
    assert difference < 1e-5 * max(1.0, _logits(dense).abs().max().item())
    assert names == (f"{base.name.lower()}-0/model", f"{base.name.lower()}-1/model")


def test_prompts_decide_and_a_model_can_leave(config_of: Any, tmp_path: Path) -> None:
    import torch

    from composer import load

    config = config_of("gemma3_text", model={"head_dim": 8}, experts=3, experts_per_token=1)
    names = compose_moe(parse(config), tmp_path / "out")
    left = load(tmp_path / "out", opt_out={names[2].partition("/")[0]})
    config["experts"].pop()
    compose_moe(parse(config), tmp_path / "never")
    assert torch.equal(_logits(left), _logits(load(tmp_path / "never")))
    assert not torch.equal(_logits(left), _logits(load(tmp_path / "out")))


def test_adapters_are_added_first(make_model: Any, adapter: Any, tmp_path: Path) -> None:
    """Against PEFT's own merged models, of the expert and of the base."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from composer import load

    base, other = make_model(), str(make_model(seed=1))
    adapters = [adapter(seed=seed) for seed in (1, 2)]
    merged = [tmp_path / "merged" / path.name for path in adapters]  # router rows are drawn by name
    for path, folder in zip(adapters, merged, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
            model.merge_and_unload().save_pretrained(folder)
        for file in base.glob("*token*"):
            (folder / file.name).write_bytes(file.read_bytes())

    def composed(first: object, second: object, name: str) -> tuple[Any, Any]:
        experts = [{"source_model": str(second)}, {"source_model": other}]
        config = {"base_model": str(first), "gate_mode": "random", "experts": experts}
        return compose_moe(parse(config), tmp_path / name), _logits(load(tmp_path / name))

    names, ours = composed(f"{base}+{adapters[0]}", f"{base}+{adapters[1]}", "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "ours"]
    assert names == (f"{adapters[1].name}/model", f"{Path(other).name.lower()}/model")
    torch.testing.assert_close(ours, composed(*merged, "theirs")[1], rtol=0, atol=1e-5)


def test_refusals(config_of: Any, make_model: Any, tmp_path: Path) -> None:
    config = config_of(gate_mode="random")
    (tmp_path / "out").mkdir()
    with pytest.raises(BuildError, match=r"exists\. Choose another name"):
        compose_moe(parse(config), tmp_path / "out")
    config["shared_experts"] = [{"source_model": config["base_model"]}]
    config["experts"][0] |= {"noise_scale": 0.1}
    with pytest.raises(PlanError) as caught:
        compose_moe(parse(config), tmp_path / "new")
    assert list(caught.value.problems) == [
        "shared_experts: recipe 'btx' has none; list the model among the experts",
        "experts.0: noise_scale and residual_scale would change an owner's model",
    ]
    config = config_of(gate_mode="random")
    config["experts"][1]["source_model"] = str(make_model(intermediate_size=80))
    with pytest.raises(AdmissionError, match="intermediate_size: the expert has 80, the base 48"):
        compose_moe(parse(config), tmp_path / "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
