"""plan, build, generate and verify-optout on a pico composition, and what they say about bad input."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

PLAN_KEYS = [
    "name",
    "recipe",
    "base",
    "router",
    "experts",
    "owners",
    "left_out",
    "optout_class",
    "parameters_total",
    "parameters_active",
    "bytes",
    "flops_per_token",
    "warnings",
]


def write(folder: Path, text: str) -> Path:
    path = folder / "m.yaml"
    path.write_text(text)
    return path


HEAD = "format_version: 1\nname: duo\nrecipe: flexolmo\nbase: pico\n"


BAD_MANIFESTS = {
    "several mistakes": (
        HEAD + "experts: [acme/contracts]\nrouter: {scorer_: lda, top_k: 0}\n",
        "Error: manifest m.yaml has 2 problems:\n"
        "  - router.top_k: input should be greater than or equal to 1, given 0\n"
        "  - router.scorer_: unknown key; did you mean 'scorer'? Allowed: context, layer, normalize, options, preset, "
        "public_prompts, scorer, selector, selector_options, token_weight, top_k\n",
    ),
    "unknown expert": (
        HEAD + "experts: [acme/contract, hosp/icd]\n",
        "Error: Manifest 'duo' cannot be composed:\n"
        "  - experts[0]: Unknown expert 'acme/contract'. Did you mean 'acme/contracts'? Known: acme/contracts, "
        "hosp/icd, soft/python. The registry is 'REGISTRY'.\n",
    ),
    "unknown scorer": (
        HEAD + "experts: [acme/contracts]\nrouter: {scorer: ldaa}\n",
        "Error: Manifest 'duo' cannot be composed:\n"
        "  - Unknown scorer 'ldaa'. Did you mean 'lda'? Known: dume, lda, learned, prompts, random, ridge.\n",
    ),
    "unknown recipe": (
        HEAD.replace("flexolmo", "flexolm") + "experts: [acme/contracts]\n",
        "Error: Unknown recipe 'flexolm'. Did you mean 'flexolmo'? Known: bam, btx, flexolmo, merge, "
        "router_retriever, soup, sparse_upcycle.\n",
    ),
    "duplicate key": (
        HEAD + "experts: [acme/contracts]\nexperts: [hosp/icd]\n",
        "Error: manifest m.yaml, line 6, column 1: key 'experts' occurs twice; keep one of them.\n",
    ),
    "opting out everybody": (
        HEAD + "experts: [acme/contracts, hosp/icd]\nopt_out: [acme, hosp]\n",
        "Error: Manifest 'duo': opt_out leaves no expert (acme/contracts, hosp/icd). Use the base 'pico' itself, or "
        "leave fewer owners out.\n",
    ),
    "opting out a stranger": (
        HEAD + "experts: [acme/contracts]\nopt_out: [acne]\n",
        "Error: Manifest 'duo' cannot be composed:\n"
        "  - opt_out: Unknown owner 'acne'. Did you mean 'acme'? Known: acme.\n",
    ),
    "alias": (
        "a: &a [x]\nb: *a\n",
        "Error: manifest m.yaml, line 1, column 4: anchor '&a' is not allowed; remove it.\n",
    ),
    "nesting": (
        "[" * 100 + "]" * 100,
        "Error: manifest m.yaml, line 1, column 33: nested more than 32 levels deep.\n",
    ),
}


class TestPlan:
    def test_text(self, run: Any, filled: Path, manifest: Path) -> None:
        outcome = run("plan", manifest, registry=filled)
        assert (outcome.code, outcome.err) == (0, "")
        lines = outcome.out.splitlines()
        assert lines[:3] == [
            "name:          trio",
            "recipe:        flexolmo",
            "router:        lda (running_mean), topk 2",
        ]
        assert lines[3].startswith("base:          pico, 1")
        assert "opt-out class: exact" in lines
        table = lines[lines.index("") + 1 :]
        assert table[0].split() == [
            "EXPERT",
            "DOMAIN",
            "LICENSE",
            "KIND",
            "LAYERS",
            "RANK",
            "PARAMETERS",
            "SIZE",
        ]
        assert table[1].split()[:7] == ["acme/contracts@1", "law", "Apache-2.0", "lora", "2-3", "2", "960"]
        assert len(table) == 4

    def test_json(self, run: Any, filled: Path, manifest: Path, base_folder: Path) -> None:
        from safetensors.numpy import load_file

        plan = run("plan", manifest, "--json", registry=filled).json
        assert list(plan) == PLAN_KEYS
        assert plan["owners"] == ["acme", "hosp", "soft"]
        anchor = sum(tensor.size for tensor in load_file(base_folder / "model.safetensors").values())
        assert plan["parameters_total"] == anchor + 3 * 960

    def test_no_manifest(self, run: Any, filled: Path, tmp_path: Path) -> None:
        outcome = run("plan", tmp_path / "none.yaml", registry=filled)
        assert (outcome.code, outcome.out, outcome.err) == (
            2,
            "",
            f"Error: There is no manifest at {tmp_path}/none.yaml.\n",
        )

    @pytest.mark.parametrize(("text", "message"), BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
    def test_bad_manifest(self, text: str, message: str, run: Any, filled: Path, tmp_path: Path) -> None:
        path = write(tmp_path, text)
        for command in (("plan", path), ("build", path, tmp_path / "out")):
            outcome = run(*command, registry=filled)
            assert (outcome.code, outcome.out) == (2, "")
            assert outcome.err == message.replace("REGISTRY", str(filled))
        assert list(tmp_path.iterdir()) == [path]

    def test_an_opted_out_owner(self, run: Any, registry: Path, manifest: Path) -> None:
        assert run("opt-out", "add", "acme", "--reason", "gone", "--by", "ann", registry=registry).code == 0
        (entry,) = run("opt-out", "list", "--json", registry=registry).json
        outcome = run("plan", manifest, registry=registry)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err == (
            "Error: The manifest names experts of owners who have opted out. Remove them, or list the owners under "
            f"'opt_out':\n  - acme/contracts: acme opted out on {entry['when']} (recorded by ann): gone\n"
        )


class TestBuild:
    def test_build_links(self, run: Any, filled: Path, manifest: Path, tmp_path: Path) -> None:
        outcome = run("build", manifest, tmp_path / "out", registry=filled)
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out.startswith(f"Built {tmp_path}/out: 3 experts of acme, hosp, soft on pico, ")
        assert " linked in " in outcome.out
        assert (tmp_path / "out" / "base" / "model.safetensors").stat().st_nlink > 1

    def test_copy_stands_alone(self, run: Any, filled: Path, manifest: Path, tmp_path: Path) -> None:
        outcome = run("build", manifest, tmp_path / "out", "--copy", "--json", registry=filled)
        assert outcome.code == 0, outcome.err
        assert list(outcome.json) == [*PLAN_KEYS, "out", "copied", "seconds"]
        assert outcome.json["copied"] is True
        assert (tmp_path / "out" / "base" / "model.safetensors").stat().st_nlink == 1

    def test_dry_run_writes_nothing(self, run: Any, filled: Path, manifest: Path, tmp_path: Path) -> None:
        outcome = run("build", manifest, tmp_path / "out", "--dry-run", registry=filled)
        assert outcome.out == run("plan", manifest, registry=filled).out
        assert list(tmp_path.iterdir()) == []

    def test_the_folder_exists(self, run: Any, filled: Path, manifest: Path, tmp_path: Path) -> None:
        outcome = run("build", manifest, tmp_path, registry=filled)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err == (
            f"Error: The output folder {tmp_path} exists. Choose another name, or remove it first.\n"
        )

    def test_interrupted(
        self, run: Any, filled: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import composer.building

        placed: list[Path] = []

        def third_time_interrupted(source: Path, target: Path, *, copy: bool = False) -> None:
            placed.append(target)
            if len(placed) == 3:
                raise KeyboardInterrupt
            shutil.copyfile(source, target)

        monkeypatch.setattr(composer.building, "link_file", third_time_interrupted)
        outcome = run("build", manifest, tmp_path / "out", registry=filled)
        assert (outcome.code, outcome.out, outcome.err) == (130, "", "Interrupted.\n")
        assert list(tmp_path.iterdir()) == []


class TestGenerate:
    def test_greedy_is_repeatable_and_starts_with_the_prompt(
        self, run: Any, composed: Path, filled: Path
    ) -> None:
        first = run(
            "generate", composed, "--prompt", "The licensee", "--max-new-tokens", "5", registry=filled
        )
        assert (first.code, first.err) == (0, "")
        assert first.out.startswith("The licensee")
        assert run("generate", composed, "--prompt", "The licensee", "--max-new-tokens", "5").out == first.out

    def test_seed(self, run: Any, composed: Path) -> None:
        args = ("generate", composed, "--prompt", "x", "--max-new-tokens", "12", "--json")
        one, same, other = (run(*args, "--seed", seed).json for seed in (1, 1, 2))
        assert one["completion"] == same["completion"] != other["completion"]
        assert (one["seed"], one["prompt"], one["tokens"] <= 12) == (1, "x", True)
        assert list(one) == ["prompt", "completion", "tokens", "seconds", "seed", "owners", "dtype"]

    def test_opt_out_is_the_model_without_the_owner(
        self, run: Any, composed: Path, filled: Path, tmp_path: Path
    ) -> None:
        never = write(tmp_path, HEAD + "experts: [hosp/icd, soft/python]\n")
        assert run("build", never, tmp_path / "never", registry=filled).code == 0
        args = ("--prompt", "The licensee shall", "--max-new-tokens", "12", "--json")
        left_out = run("generate", composed, "--opt-out", "acme", *args).json
        never_joined = run("generate", tmp_path / "never", *args).json
        whole = run("generate", composed, *args).json
        assert left_out["completion"] == never_joined["completion"] != whole["completion"]
        assert (left_out["owners"], whole["owners"]) == (["hosp", "soft"], ["acme", "hosp", "soft"])

    def test_an_opt_out_in_the_registry_counts(self, run: Any, composed: Path, registry: Path) -> None:
        assert run("opt-out", "add", "acme", "--reason", "x", registry=registry).code == 0
        outcome = run(
            "generate", composed, "--prompt", "x", "--max-new-tokens", "2", "--json", registry=registry
        )
        assert outcome.err == "Note: acme has opted out since the build and is left out.\n"
        assert outcome.json["owners"] == ["hosp", "soft"]

    def test_stdin(self, run: Any, composed: Path) -> None:
        outcome = run("generate", composed, "--prompt", "-", "--max-new-tokens", "1", stdin="from stdin")
        assert outcome.out.startswith("from stdin")

    def test_unknown_owner(self, run: Any, composed: Path) -> None:
        outcome = run("generate", composed, "--prompt", "x", "--opt-out", "acne")
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith(
            "Error: Unknown owner 'acne'. Did you mean 'acme'? Known: acme, hosp, soft."
        )

    def test_options_without_effect(self, run: Any, composed: Path) -> None:
        outcome = run("generate", composed, "--prompt", "x", "--temperature", "0.5")
        assert outcome.code == 2
        assert outcome.err == (
            "Error: --temperature has no effect without --seed: without one the likeliest token is taken.\n"
        )

    def test_empty_prompt(self, run: Any, composed: Path) -> None:
        outcome = run("generate", composed, "--prompt", "")
        assert (outcome.code, outcome.err) == (
            2,
            "Error: The prompt is empty. Give at least one character.\n",
        )

    def test_not_a_composed_folder(self, run: Any, tmp_path: Path) -> None:
        outcome = run("generate", tmp_path, "--prompt", "x")
        assert outcome.code == 2
        assert outcome.err == (
            f"Error: {tmp_path} is not a composed folder: it has no composition.json. Make one with `coterie build`.\n"
        )


class TestVerifyOptout:
    def test_every_owner_and_door(self, run: Any, composed: Path, tmp_path: Path) -> None:
        (tmp_path / "prompts.txt").write_text("The licensee shall indemnify")
        outcome = run("verify-optout", composed, "--text", tmp_path / "prompts.txt")
        assert (outcome.code, outcome.err) == (0, "")
        lines = outcome.out.splitlines()
        assert lines[0] == "OWNER  DOOR     LARGEST DIFFERENCE  BIT-IDENTICAL  PROMPTS  RESULT"
        assert [tuple(line.split()[:2]) for line in lines[1:]] == [
            (owner, door) for owner in ("acme", "hosp", "soft") for door in ("build", "load", "request")
        ]
        assert {tuple(line.split()[-2:]) for line in lines[1:]} == {
            ("5", "ok")
        }  # four random prompts and one real
        assert list(composed.parent.iterdir()) == [composed]

    def test_one_owner_as_json(self, run: Any, composed: Path) -> None:
        rows = run("verify-optout", composed, "--owner", "hosp", "--json").json
        assert [list(row) for row in rows] == [
            ["owner", "door", "max_abs_diff", "bit_identical", "passed", "prompts"]
        ] * 3
        assert [row["max_abs_diff"] for row in rows[:2]] == [0.0, 0.0]
        assert [row["bit_identical"] for row in rows[:2]] == [True, True]
        assert 0 <= rows[2]["max_abs_diff"] <= 1e-5

    def test_a_difference_fails(self, run: Any, composed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import composer.verify
        from composer.verify import Verification

        row = Verification(
            owner="acme", door="load", max_abs_diff=0.5, bit_identical=False, passed=False, prompts=4
        )
        equal = replace(row, door="request", max_abs_diff=0.0, bit_identical=True, passed=True)
        monkeypatch.setattr(composer.verify, "_verify_owner", lambda *args: [row, equal])
        outcome = run("verify-optout", composed, "--owner", "acme")
        assert outcome.code == 1
        assert outcome.out.splitlines()[1].split() == ["acme", "load", "5.0e-01", "no", "4", "FAILED"]
        assert outcome.err == (
            "Error: opting out is not what never having joined gives: 1 of 2 comparisons failed.\n"
        )

    def test_unknown_owner(self, run: Any, composed: Path) -> None:
        outcome = run("verify-optout", composed, "--owner", "acne")
        assert outcome.code == 2
        assert outcome.err == "Error: Unknown owner 'acne'. Did you mean 'acme'? Known: acme, hosp, soft.\n"
