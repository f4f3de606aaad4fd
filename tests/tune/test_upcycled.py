"""Tuning mixtures of whole models: attention routers are routers, shared projections trunk, and owners still leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import composer
from composer.lock import Lock
from composer.tuned import parameter_groups
from experts.errors import OptOutError
from pipelines.tune import TuneJob, plan_tuning, tune

DENSE = ("acme/dense", "bob/dense", "zoe/dense")


def _composed(pico: Any, recipe: str, **upcycle: Any) -> Path:
    found: Path = pico.composed("dense", recipe=recipe, experts=DENSE, upcycle=upcycle, scorer="random")
    return found


def _logits(model: Any, pico: Any, **options: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(pico.prompts(), use_cache=False, **options).logits  # type: ignore[no-any-return]


def test_groups_of_a_model_with_attention_experts(pico: Any) -> None:
    model = composer.load(_composed(pico, "bam", attention={"kv": "shared"}))
    groups = parameter_groups(model)
    of = {group: [name for name in groups if groups[name] == group] for group in set(groups.values())}
    layers = len([name for name in groups if name.endswith("input_layernorm.weight")])
    assert len(of["routers"]) == 2 * layers
    assert all(
        name.endswith(("self_attn.router.scorer.rows", "mlp.router.scorer.rows")) for name in of["routers"]
    )
    shared = [name for name in of["trunk"] if "k_proj" in name or "v_proj" in name]
    assert len(shared) == 2 * layers
    assert all("mlp.experts" in n or "q_proj" in n or "o_proj" in n for n in of["experts"])


@pytest.mark.parametrize(
    ("recipe", "upcycle", "before"),
    [
        ("bam", {"attention": {"kv": "own"}}, "recompose"),
        ("btx", {"trunk": "frozen"}, "exact"),
    ],
)
def test_owners_leave_what_was_tuned(
    pico: Any, job: Callable[..., TuneJob], tmp_path: Path, recipe: str, upcycle: dict[str, Any], before: str
) -> None:
    untuned, registry = _composed(pico, recipe, **upcycle), pico.dense_library()
    wanted = job(train="trunk", steps=2, batch_size=2)
    plan = plan_tuning(untuned, wanted, registry=registry)
    assert plan.optout_class_before == before
    tune(plan, wanted, tmp_path / "tuned", registry=registry, device="cpu")
    lock = Lock.read(tmp_path / "tuned")
    assert lock.optout_class == "retrain"
    assert lock.tuned is not None
    assert {entry.path for entry in lock.tuned.files} == {"routers.safetensors", "trunk.safetensors"}
    whole, never = composer.load(tmp_path / "tuned"), composer.load(untuned, opt_out={"bob"})
    assert not torch.equal(_logits(whole, pico), _logits(composer.load(untuned), pico))
    without = composer.load(tmp_path / "tuned", opt_out={"bob"})
    assert torch.equal(_logits(without, pico), _logits(never, pico))
    if before == "exact":
        asked = _logits(whole, pico, opt_out={"bob"})
        torch.testing.assert_close(asked, _logits(never, pico), atol=1e-5, rtol=0)
    else:
        with pytest.raises(
            OptOutError, match="The trunk of this composition is merged from every owner's model"
        ):
            _logits(whole, pico, opt_out={"bob"})
