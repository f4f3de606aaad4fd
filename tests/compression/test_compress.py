"""Compressed experts: what is written, what it costs, and that it is an expert like any other."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from composer.loading import load
from experts.admission import check_expert
from experts.errors import AdmissionError, ConsentError, UnknownNameError
from experts.package import read_package
from pipelines.compression import CompressionError
from pipelines.compression.report import CompressionReport

GATED = ("llama", "phi3")
"""Families without biases: separate gate and up, and fused."""


def changes(pico: Any, registry: Any, name: str, family: str = "llama") -> dict[str, np.ndarray]:
    """Every linear's change, by numpy, from the files."""
    expert = load_file(registry.files(registry.expert(name))["ffn.safetensors"])
    anchor = load_file(pico.base(family) / "model.safetensors")
    return {
        key.removesuffix(".weight"): tensor.double().numpy() - anchor[key].double().numpy()
        for key, tensor in expert.items()
    }


def tails(deltas: dict[str, np.ndarray], ranks: dict[str, int]) -> dict[str, float]:
    found = {}
    for name, delta in deltas.items():
        s = np.linalg.svd(delta, compute_uv=False)
        found[name] = float(np.sqrt((s[ranks[name] :] ** 2).sum() / (s**2).sum()))
    return found


def with_peft(base: Any, folder: Path) -> Any:
    """The adapter as PEFT alone loads it."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, folder).eval()


class TestCost:
    @pytest.mark.parametrize("family", GATED)
    @pytest.mark.parametrize("rank", ["1", "8", "energy=0.5", "auto"])
    def test_the_error_is_the_tail_of_the_singular_values(
        self, family: str, rank: str, compress: Any, pico: Any
    ) -> None:
        registry = pico.library(family)
        report = compress("bob/full", family=family, rank=rank, out=None, registry=registry).report
        deltas = changes(pico, registry, "bob/full", family)
        assert [linear.name for linear in report.linears] == [
            spec.name for layer in (2, 3) for spec in pico.description(family).ffn_linears(layer).values()
        ]
        expected = tails(deltas, {linear.name: linear.rank for linear in report.linears})
        for linear in report.linears:
            assert linear.relative_error == pytest.approx(expected[linear.name], rel=1e-5)
            assert linear.norm == pytest.approx(np.linalg.norm(deltas[linear.name]))
        norm = np.sqrt(sum((delta**2).sum() for delta in deltas.values()))
        lost = np.sqrt(sum((expected[name] * np.linalg.norm(delta)) ** 2 for name, delta in deltas.items()))
        assert report.relative_error == pytest.approx(lost / norm, rel=1e-5)

    def test_more_rank_less_error(self, compress: Any) -> None:
        reports = [compress("zoe/full", rank=str(rank), out=None).report for rank in (1, 2, 4, 8, 16, 32)]
        errors = [report.relative_error for report in reports]
        assert errors == sorted(errors, reverse=True)
        assert len(set(errors)) == len(errors)
        assert errors[-1] < 1e-6
        sizes = [report.bytes_after for report in reports]
        assert sizes == sorted(sizes)

    def test_energy_is_what_is_kept(self, compress: Any) -> None:
        for share in (0.3, 0.9, 0.99):
            for linear in compress("bob/full", rank=f"energy={share}", out=None).report.linears:
                assert 1 - linear.relative_error**2 >= share - 1e-6
            fewer = compress("bob/full", rank=str(linear.rank - 1), out=None).report.linears[-1]
            assert 1 - fewer.relative_error**2 < share

    def test_auto_takes_a_third_of_the_bytes_at_most(self, compress: Any, tmp_path: Path) -> None:
        report: CompressionReport = compress("acme/full", rank="auto").report
        assert report.bytes_after <= report.bytes_before / 3
        stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert report.bytes_after == sum(tensor.nbytes for tensor in stored.values())

    def test_the_rank_of_the_change_is_found(self, compress: Any) -> None:
        report = compress(rank="energy=1", out=None).report
        assert [linear.rank for linear in report.linears] == [3, 3, 3, 5, 5, 5]
        assert report.relative_error < 1e-5

    def test_an_expert_that_is_the_anchor(self, compress: Any, pico: Any) -> None:
        raw = pico.write_ffn(pico.scratch("raw"), seed=1, layers=(1, 2), copy=True)
        package = pico.pack(raw, name="acme/copy")
        report = compress(package, rank="energy=0.9").report
        assert {(linear.rank, linear.norm, linear.relative_error) for linear in report.linears} == {
            (1, 0.0, 0.0)
        }
        assert (report.relative_error, report.to_dict()["energy"]) == (0.0, 1.0)


class TestLikelihood:
    def test_each_expert_alone(self, compress: Any, pico: Any, near: Any, domain_texts: Any) -> None:
        """Against models whose weights numpy put together."""
        from transformers import AutoTokenizer

        from pipelines.evaluate import evaluate

        made = compress(rank="1", data=domain_texts, sequence_length=32, out=None)
        deltas = changes(pico, near, "acme/near")
        tokenizer = AutoTokenizer.from_pretrained(pico.base())
        expected: dict[str, dict[str, float]] = {}
        for arm, rank in {"anchor": 0, "low_rank": 1, "full": 32}.items():
            model = pico.network()
            model.load_state_dict(pico.dense().state_dict())
            for name, delta in deltas.items():
                u, s, v = np.linalg.svd(delta, full_matrices=False)
                change = (u[:, :rank] * s[:rank]) @ v[:rank]
                model.get_submodule(name).weight.data += torch.from_numpy(change).float()
            result = evaluate(model, tokenizer, domain_texts, sequence_length=32)
            expected[arm] = {name: score.nll for name, score in result.domains.items()}
        for name, cost in made.report.domains.items():
            for arm in expected:
                assert getattr(cost, arm) == pytest.approx(expected[arm][name], abs=1e-5), (name, arm)
            assert cost.tokens > 0
            assert cost.relative_cost == pytest.approx(
                expected["low_rank"][name] / expected["full"][name] - 1, abs=1e-5
            )
            assert len({cost.anchor, cost.full, cost.low_rank}) == 3


class TestExpert:
    @pytest.mark.parametrize("family", GATED)
    def test_at_full_rank_it_is_the_full_expert(
        self, family: str, compress: Any, pico: Any, tmp_path: Path
    ) -> None:
        """By PEFT alone, and in a composition that sends it every token it sends the full one."""
        registry = pico.fresh_library(family)
        made = compress("acme/full", family=family, rank="32", registry=registry, name="acme/svd")
        registry.register(tmp_path / "out")
        ids = pico.prompts()
        full = pico.network(family)
        full.load_state_dict(pico.dense(family).state_dict())
        own = load_file(registry.files(registry.expert("acme/full"))["ffn.safetensors"])
        full.load_state_dict(own, strict=False)
        base = pico.network(family)
        base.load_state_dict(pico.dense(family).state_dict())
        adapted = with_peft(base, tmp_path / "out")
        with torch.inference_mode():
            torch.testing.assert_close(adapted(ids).logits, full(ids).logits, rtol=0, atol=1e-4)
            logits = [
                load(pico.compose(pico.manifest(experts=experts, family=family), registry=registry))(
                    ids
                ).logits
                for experts in (["acme/full", "bob/full", "zoe/low"], ["acme/svd", "bob/full", "zoe/low"])
            ]
        torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)
        assert made.card is not None
        assert made.card.rank == 32

    def test_peft_loads_ranks_that_differ(self, compress: Any, pico: Any, near: Any, tmp_path: Path) -> None:
        report = compress(rank="energy=1").report
        ranks = {linear.name: linear.rank for linear in report.linears}
        assert len(set(ranks.values())) > 1, "or the test says nothing"
        base = pico.network()
        adapted = with_peft(base, tmp_path / "out")
        loaded = {
            name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
            for name, module in adapted.named_modules()
            if hasattr(module, "lora_A")
        }
        assert loaded == {name: (rank, 1.0) for name, rank in ranks.items()}
        for name, delta in changes(pico, near, "acme/near").items():
            u, s, v = np.linalg.svd(delta, full_matrices=False)
            r = ranks[name]
            update = adapted.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
            np.testing.assert_allclose(update.detach().numpy(), (u[:, :r] * s[:r]) @ v[:r], atol=1e-5)

    def test_full_and_low_rank_experts_in_one_model(
        self, compress: Any, pico: Any, near: Any, tmp_path: Path
    ) -> None:
        """A compressed, a trained low-rank and a full expert, each with ranks of its own."""
        from composer.blocks.low_rank import LowRankExpert
        from composer.verify import verify_optout

        registry = type(near)(shutil.copytree(near.path, pico.scratch("registry")))
        made = compress("acme/near", rank="energy=1", registry=near, name="acme/svd")
        registry.register(tmp_path / "out")
        folder = pico.compose(
            pico.manifest(experts=["acme/svd", "bob/low", "zoe/full"], top_k=4), registry=registry
        )
        model = load(folder)
        found = [
            {role: len(a) for role, a in module.lora_A.items()}
            for module in model.modules()
            if isinstance(module, LowRankExpert)
        ]
        assert found == [dict.fromkeys(("gate", "up", "down"), rank) for rank in (3, 3, 5, 3)]
        assert made.card is not None
        assert made.card.rank == 5
        assert all(row.passed for row in verify_optout(folder, owner="acme"))

    @pytest.mark.parametrize("kinds", ["low-rank alone", "with a full one"])
    def test_the_anchor_is_multiplied_once_per_token(self, kinds: str, pico: Any) -> None:
        """However many low-rank experts a token meets."""
        from composer.blocks.low_rank import LowRankFFN

        last = "zoe/low" if kinds == "low-rank alone" else "zoe/full"
        model = load(pico.composed(experts=("acme/low", "bob/low", last), top_k=4))
        seen: list[tuple[torch.nn.Module, int]] = []
        blocks = [module for module in model.modules() if isinstance(module, LowRankFFN)]
        for block in blocks:
            for linear in (*block.parts.inputs.values(), block.parts.down):
                linear.register_forward_hook(
                    lambda module, inputs, _: seen.append((module, inputs[0].shape[0]))
                )
        ids = pico.prompts()
        with torch.inference_mode():
            model(ids)
        assert len(blocks) == 3
        assert len({module for module, _ in seen}) == len(seen) == 9
        assert {tokens for _, tokens in seen} == {ids.numel()}

    def test_the_card(self, compress: Any, near: Any, pico: Any, tmp_path: Path) -> None:
        made = compress(rank="2")
        full = near.card("acme/near")
        card = read_package(tmp_path / "out")
        assert made.card == card
        assert (card.name, card.version, card.kind, card.rank) == ("acme/near", 2, "lora", 2)
        same = (
            "owner",
            "domain",
            "license",
            "base",
            "layers",
            "routing",
            "terms",
            "description",
            "optout_class",
        )
        assert all(getattr(card, name) == getattr(full, name) for name in same)
        assert card.derived_from == (full.digest,)
        assert card.training.method == f"{full.training.method}+svd"
        assert card.training.settings == {**full.training.settings, "svd.rank": "2"}
        assert card.metrics == {"svd.relative_error": made.report.relative_error}
        routing = full.routing.file
        assert (tmp_path / "out" / routing).read_bytes() == near.files(full)[routing].read_bytes()
        check_expert(tmp_path / "out", card, pico.description())

    def test_the_anchors_dtype_is_kept(self, compress: Any, pico: Any, tmp_path: Path) -> None:
        raw = pico.write_ffn(pico.scratch("raw"), seed=1, layers=(1,))
        tensors = {k: v.bfloat16() for k, v in load_file(raw / "ffn.safetensors").items()}
        save_file(tensors, raw / "ffn.safetensors")
        package = pico.pack(raw, name="acme/half", version=4)
        made = compress(package, rank="32")
        stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        assert made.version == 5
        assert 1e-4 < made.report.relative_error < 1e-2, "what rounding the factors costs is told"

    def test_the_owner_may_keep_working(self, compress: Any, near: Any, tmp_path: Path) -> None:
        made = compress(rank="2", name="acme/small")
        assert (made.name, made.version) == ("acme/small", 1)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


class TestRefused:
    def test_low_rank_already(self, compress: Any, tmp_path: Path) -> None:
        with pytest.raises(CompressionError) as caught:
            compress("acme/low", rank="2")
        assert str(caught.value) == (
            "acme/low is of kind 'lora', low-rank already (rank 2). Only full experts (kind 'ffn') can be compressed."
        )
        assert not list(tmp_path.iterdir())

    def test_biases(self, compress: Any, pico: Any, tmp_path: Path) -> None:
        with pytest.raises(CompressionError) as caught:
            compress("bob/full", family="gpt_neox", rank="2")
        first, *rest = str(caught.value).splitlines()
        assert first == (
            "bob/full changes biases of the anchor's FFNs, and a low-rank expert cannot carry biases (PEFT: bias "
            "'none'). Train the expert as kind 'lora' instead:"
        )
        assert [line.partition(":")[0] for line in rest] == [
            f"  - gpt_neox.layers.{layer}.mlp.{name}.bias"
            for layer in (2, 3)
            for name in ("dense_h_to_4h", "dense_4h_to_h")
        ]
        assert not list(tmp_path.iterdir())

    def test_biases_that_are_the_anchors(self, compress: Any, pico: Any, tmp_path: Path) -> None:
        raw = pico.write_ffn(pico.scratch("raw"), family="gpt_neox", seed=1, layers=(1,), copy=True)
        tensors = load_file(raw / "ffn.safetensors")
        changed = {k: v + 0.1 * torch.randn_like(v) if v.dim() == 2 else v for k, v in tensors.items()}
        save_file(changed, raw / "ffn.safetensors")
        package = pico.pack(raw, name="acme/weights", family="gpt_neox")
        assert compress(package, family="gpt_neox", rank="32").report.relative_error < 1e-6

    def test_somebody_elses_name(self, compress: Any) -> None:
        with pytest.raises(CompressionError) as caught:
            compress(rank="2", name="bob/near")
        assert str(caught.value) == (
            "The name 'bob/near' belongs to 'bob', and acme/near is acme's: what is made from it is too. Choose a name "
            "that starts with 'acme/'."
        )

    def test_unknown_expert(self, compress: Any) -> None:
        with pytest.raises(UnknownNameError, match=r"Unknown expert 'acme/nea'\. Did you mean 'acme/near'\?"):
            compress("acme/nea", rank="2")

    @pytest.mark.parametrize("source", ["nowhere", "./acme/near", "a/b/c"])
    def test_neither_folder_nor_reference(self, source: str, compress: Any) -> None:
        with pytest.raises(CompressionError) as caught:
            compress(source, rank="2")
        assert str(caught.value) == (
            f"'{source}' is neither a folder with a card (card.json), such as `coterie train` writes, nor a reference "
            "to an expert of the registry (owner/expert)."
        )

    def test_a_folder_in_use(self, compress: Any, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
        with pytest.raises(CompressionError) as caught:
            compress(rank="2")
        assert str(caught.value) == (
            f"'{tmp_path}/out' exists and is not an empty folder; name another one with --out."
        )
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]

    def test_a_folder_that_is_not_what_its_card_says(self, compress: Any, pico: Any, tmp_path: Path) -> None:
        raw = pico.write_ffn(pico.scratch("raw"), seed=1, layers=(1,))
        package = pico.pack(raw, name="acme/torn")
        with (package / "ffn.safetensors").open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"\1\2\3\4")
        with pytest.raises(AdmissionError, match=r"ffn\.safetensors"):
            compress(package, rank="2")
        assert not list(tmp_path.iterdir())

    def test_an_owner_who_is_out(self, compress: Any, pico: Any, tmp_path: Path) -> None:
        registry = pico.fresh_library()
        entry = registry.opt_out("acme", reason="gone", by="ann")
        with pytest.raises(ConsentError) as caught:
            compress("acme/full", rank="2", registry=registry)
        assert str(caught.value) == (
            f"acme/full cannot be converted: acme opted out on {entry.when} (recorded by ann): gone"
        )

    def test_an_anchor_that_is_not_there(self, compress: Any, pico: Any) -> None:
        raw = pico.write_ffn(pico.scratch("raw"), seed=1, layers=(1,))
        package = pico.pack(raw, name="acme/lost")
        registry = pico.library("qwen3")
        if any(base.name == "llama" for base in registry.bases()):
            registry = type(registry)(pico.scratch("empty"))
            registry.opt_out("somebody", reason="so that it exists", allow_unknown=True)
        with pytest.raises(CompressionError) as caught:
            compress(package, rank="2", registry=registry)
        assert str(caught.value) == (
            f"acme/lost belongs to the base 'llama' with fingerprint {pico.description().fingerprint[:12]}, which the "
            f"registry '{registry.path}' does not have. Add it with: coterie base add PATH --name llama"
        )
