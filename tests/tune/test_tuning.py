"""Tuning a composition: what moves, whose it is then, and what is left when somebody leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import composer
from composer.lock import Lock
from composer.tuned import parameter_groups
from experts.errors import BuildError, ConsentError, CoterieError, OptOutError, PlanError, TrainingError
from pipelines.tune import Tuned, TuneJob, plan_tuning, tune

Job = Callable[..., TuneJob]
ROUTER: dict[str, Any] = {"scorer": "learned", "context": "token", "top_k": 2}


def _tune(pico: Any, source: Path, job: TuneJob, out: Path, **options: Any) -> Tuned:
    registry = options.pop("registry", pico.library())
    plan = plan_tuning(source, job, registry=registry)
    return tune(plan, job, out, registry=registry, device="cpu", **options)


def _logits(model: Any, pico: Any, **options: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(pico.prompts(), use_cache=False, **options).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def untuned(pico: Any) -> Path:
    return pico.composed("stacked", **ROUTER)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def tuned(pico: Any, untuned: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three ways to tune one composition, on text of 'zed' who has no expert in it."""
    root = tmp_path_factory.mktemp("tuned")
    folders = {}
    for train in ("routers", "trunk", "all"):
        job = TuneJob.from_dict(
            {
                "train": train,
                "data": [
                    {"text": "acme.jsonl", "owner": "acme"},
                    {"text": "word.jsonl", "owner": "zed", "weight": 0.5},
                    {"text": "public.jsonl", "public": True},
                ],
                "sequence_length": 16,
                "batch_size": 2,
                "steps": 3,
                "warmup": 1,
                "learning_rate": 0.05,
                "workdir": str(root / "work"),
            },
            root=texts,
        )
        folders[train] = root / train
        _tune(pico, untuned, job, folders[train])
    assert not list((root / "work").iterdir()), "checkpoints are kept until the job is done"
    return folders


@pytest.mark.parametrize(
    ("train", "moved"),
    [("routers", {"routers"}), ("trunk", {"routers", "trunk"}), ("all", {"routers", "trunk", "experts"})],
)
def test_what_is_trained_moves_and_nothing_else_does(
    untuned: Path, tuned: dict[str, Path], train: str, moved: set[str]
) -> None:
    before, after = composer.load(untuned), composer.load(tuned[train])
    groups = parameter_groups(before)
    assert set(groups.values()) == {"routers", "trunk", "experts"}
    theirs = dict(before.named_parameters())
    changed = {name: not torch.equal(parameter, theirs[name]) for name, parameter in after.named_parameters()}
    assert {groups[name] for name, different in changed.items() if different} == moved
    # rows and attention move as a whole; a norm or an expert may be out of reach of so few tokens
    assert all(changed[name] for name, group in groups.items() if group == "routers" and "rows" in name)
    assert not any(changed[name] for name, group in groups.items() if group not in moved)


def test_the_lock_says_whose_the_weights_are(tuned: dict[str, Path], untuned: Path) -> None:
    lock = Lock.read(tuned["trunk"])
    everybody = ("acme", "bob", "zed", "zoe")
    assert lock.optout_class == "retrain"
    assert lock.tuned is not None
    assert (lock.tuned.trained, lock.tuned.owners, lock.tuned.text_owners) == (
        "trunk",
        everybody,
        ("acme", "zed"),
    )
    assert lock.tuned.optout_class == "exact"
    assert lock.lineage["tuned/routers.safetensors"] == everybody
    assert lock.lineage["tuned/trunk.safetensors"] == everybody
    assert lock.tuned.settings["share of zed"] == pytest.approx(0.2)
    assert not any(".jsonl" in str(value) for value in lock.tuned.settings.values())
    assert lock.untuned == Lock.read(untuned)
    assert {path.name for path in (tuned["routers"] / "tuned").iterdir()} == {"routers.safetensors"}
    card = (tuned["routers"] / "README.md").read_text()
    assert "Class `retrain`: after composing, its routers were trained on text of acme, zed" in card


@pytest.mark.parametrize("train", ["routers", "trunk", "all"])
def test_leaving_somebody_out_is_never_having_had_them(
    pico: Any, untuned: Path, tuned: dict[str, Path], train: str
) -> None:
    whole = composer.load(tuned[train])
    assert not torch.equal(_logits(whole, pico), _logits(pico.loaded("stacked", **ROUTER), pico))
    without = composer.load(untuned, opt_out={"bob"})
    assert torch.equal(_logits(composer.load(tuned[train], opt_out={"bob"}), pico), _logits(without, pico))
    torch.testing.assert_close(
        _logits(whole, pico, opt_out={"bob"}), _logits(without, pico), atol=1e-5, rtol=0
    )
    # an owner of text alone leaves the whole untuned composition behind, at either door
    plain = _logits(composer.load(untuned), pico)
    assert torch.equal(_logits(composer.load(tuned[train], opt_out={"zed"}), pico), plain)
    assert torch.equal(_logits(whole, pico, opt_out=[{"zed"}] * 4), plain)


def test_every_door_passes_the_proof(tuned: dict[str, Path]) -> None:
    rows = composer.verify_optout(tuned["routers"], owner="acme")
    assert [(row.door, row.passed) for row in rows] == [("build", True), ("load", True), ("request", True)]


def test_the_proof_goes_through_owners_of_text_alone(
    tuned: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an expert there is nothing not to build; a door that does not honour them is found out."""
    rows = composer.verify_optout(tuned["routers"], owner="zed")
    assert [(row.owner, row.door, row.passed) for row in rows] == [
        ("zed", "load", True),
        ("zed", "request", True),
    ]
    with pytest.raises(CoterieError) as caught:
        composer.verify_optout(tuned["routers"], owner="zedd")
    assert str(caught.value) == "Unknown owner 'zedd'. Did you mean 'zed'? Known: acme, bob, zed, zoe."

    from composer import verify

    load = verify._load
    monkeypatch.setattr(verify, "_load", lambda folder, **options: load(folder))
    rows = composer.verify_optout(tuned["routers"], owner="zed")
    assert [(row.door, row.passed) for row in rows] == [("load", False), ("request", True)]


def test_rows_that_need_different_weights_are_refused(pico: Any, tuned: dict[str, Path]) -> None:
    model = composer.load(tuned["routers"])
    with pytest.raises(OptOutError) as caught:
        _logits(model, pico, opt_out=[{"bob"}, set(), set(), {"zed"}])
    assert str(caught.value) == (
        "2 of 4 rows leave owners out. The weights of this composition were tuned on everybody's text, so these rows "
        "need the weights from before; give them a batch of their own."
    )


def test_generation_without_somebody(pico: Any, untuned: Path, tuned: dict[str, Path]) -> None:
    model, never = composer.load(tuned["all"]), composer.load(untuned, opt_out={"zoe"})
    ids = pico.prompts(rows=2)
    options: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    assert torch.equal(model.generate(ids, opt_out={"zoe"}, **options), never.generate(ids, **options))


def test_the_untuned_model_shares_what_was_left_alone(tuned: dict[str, Path]) -> None:
    model = composer.load(tuned["routers"])
    assert model.untuned is not None
    before = dict(model.untuned.model(model).named_parameters())
    groups = parameter_groups(model)
    assert {name for name, p in model.named_parameters() if before[name] is not p} == {
        name for name, group in groups.items() if group == "routers"
    }


def test_a_tuned_model_is_saved_whole_or_without_an_owner(
    pico: Any, untuned: Path, tuned: dict[str, Path], tmp_path: Path
) -> None:
    from composer.editing import remove_experts

    whole = composer.load(tuned["routers"])
    whole.save_pretrained(tmp_path / "whole")
    assert torch.equal(_logits(composer.load(tmp_path / "whole"), pico), _logits(whole, pico))
    composer.load(tuned["routers"], opt_out={"bob"}).save_pretrained(tmp_path / "less")
    assert not (tmp_path / "less" / "tuned").exists()
    shutil.copytree(untuned, tmp_path / "removed")
    remove_experts(tmp_path / "removed", ["bob"])
    assert Lock.read(tmp_path / "less") == Lock.read(tmp_path / "removed")


def test_adding_and_removing_say_that_the_tuning_is_lost(
    pico: Any, untuned: Path, tuned: dict[str, Path], tmp_path: Path
) -> None:
    from composer.editing import remove_experts

    composer.load(tuned["routers"]).save_pretrained(tmp_path / "copy")
    change = remove_experts(tmp_path / "copy", ["bob"])
    assert change.warnings == (
        "The folder was tuned; the changed one has the weights from before. Tune it again.",
    )
    assert Lock.read(tmp_path / "copy").experts == Lock.read(untuned).without({"bob"}).experts
    assert not (tmp_path / "copy" / "tuned").exists()


def test_a_tuned_folder_is_tuned_again(pico: Any, tuned: dict[str, Path], job: Job, tmp_path: Path) -> None:
    again = job(train="routers", data=[{"text": "public.jsonl", "public": True}])
    _tune(pico, tuned["trunk"], again, tmp_path / "out")
    lock, before = Lock.read(tmp_path / "out"), Lock.read(tuned["trunk"])
    assert lock.tuned is not None
    assert before.tuned is not None
    assert (lock.tuned.trained, lock.tuned.text_owners) == ("trunk", ("acme", "zed"))
    by_name = [{entry.path: entry.sha256 for entry in tuning.files} for tuning in (lock.tuned, before.tuned)]
    assert by_name[0]["trunk.safetensors"] == by_name[1]["trunk.safetensors"]
    assert by_name[0]["routers.safetensors"] != by_name[1]["routers.safetensors"]
    assert lock.untuned == before.untuned


@pytest.mark.parametrize("at", [1, 3])
def test_an_interrupted_job_ends_with_the_same_bits(
    pico: Any, untuned: Path, job: Job, tmp_path: Path, at: int
) -> None:
    wanted = job(train="all", micro_batch=2)
    _tune(pico, untuned, wanted, tmp_path / "whole")

    def interrupt(done: int, total: int) -> None:
        if done == at * 4 * 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _tune(pico, untuned, wanted, tmp_path / "cut", progress=interrupt)
    assert not (tmp_path / "cut").exists()
    result = _tune(pico, untuned, wanted, tmp_path / "cut")
    assert result.resumed_from == at
    files = [Lock.read(tmp_path / name).tuned for name in ("whole", "cut")]
    assert files[0] == files[1]


def test_a_manifest_is_built_and_tuned_at_once(pico: Any, untuned: Path, job: Job, tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump(pico.manifest("stacked", **ROUTER).to_dict()))
    _tune(pico, path, job(), tmp_path / "from-manifest")
    _tune(pico, untuned, job(), tmp_path / "from-folder")
    one, other = (Lock.read(tmp_path / name) for name in ("from-manifest", "from-folder"))
    assert one == other
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "from-folder", "from-manifest", "manifest.yaml", "work"
    ]  # fmt: skip


class TestRefused:
    def test_a_solved_router_has_nothing_to_train(self, pico: Any, job: Job) -> None:
        with pytest.raises(PlanError) as caught:
            plan_tuning(pico.composed("stacked"), job(), registry=pico.library())
        assert str(caught.value).startswith(
            "train: routers, but the router 'lda' is solved from statistics and has nothing to train. Compose with a "
            "scorer that has ('learned'"
        )

    def test_one_dense_model_has_no_router(self, pico: Any, job: Job) -> None:
        path = pico.composed("dense", recipe="soup")
        with pytest.raises(PlanError) as caught:
            plan_tuning(path, job(), registry=pico.dense_library())
        assert str(caught.value) == (
            "train: routers, but 'soup' makes one dense model, which has no router. Train the trunk, or compose with a "
            "recipe that routes (`btx`, `bam`)."
        )
        plan_tuning(path, job(train="trunk"), registry=pico.dense_library())

    def test_a_damaged_checkpoint_is_named(self, pico: Any, untuned: Path, job: Job, tmp_path: Path) -> None:
        """Deleting the file that the message names is all it takes."""

        def stop(done: int, total: int) -> None:
            if done == 3 * 4 * 16:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            _tune(pico, untuned, job(), tmp_path / "out", progress=stop)
        (path,) = (tmp_path / "work").rglob("checkpoint.safetensors")
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(TrainingError) as caught:
            _tune(pico, untuned, job(), tmp_path / "out")
        assert str(caught.value).startswith(f"The checkpoint {path} is damaged (")
        assert str(caught.value).endswith(
            "), so the job cannot go on from it. Delete the file to begin anew."
        )
        assert not (tmp_path / "out").exists()
        path.unlink()
        assert _tune(pico, untuned, job(), tmp_path / "out").resumed_from == 0

    def test_owners_who_opted_out(self, pico: Any, untuned: Path, job: Job) -> None:
        registry = pico.fresh_library()
        registry.opt_out("acme", by="acme's counsel", reason="no more")
        with pytest.raises(ConsentError) as caught:
            plan_tuning(untuned, job(), registry=registry)
        head, line = str(caught.value).split("\n")
        assert head == (
            "Tuning would put owners who have opted out into every trained weight. Take their text out of the job, "
            "and their experts out of the composition with `coterie remove`:"
        )
        assert line.startswith("  - acme opted out on ")
        assert line.endswith("(recorded by acme's counsel): no more")

    def test_an_output_folder_that_exists(self, pico: Any, untuned: Path, job: Job, tmp_path: Path) -> None:
        with pytest.raises(BuildError) as caught:
            _tune(pico, untuned, job(), tmp_path)
        assert str(caught.value) == (
            f"The output folder {tmp_path} exists. Choose another name, or remove it first."
        )

    def test_tuned_weights_that_changed(self, pico: Any, tuned: dict[str, Path], tmp_path: Path) -> None:
        composer.load(tuned["routers"]).save_pretrained(tmp_path / "copy")
        path = tmp_path / "copy" / "tuned" / "routers.safetensors"
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data[:-1])
        with pytest.raises(BuildError) as caught:
            composer.load(tmp_path / "copy")
        assert str(caught.value) == (
            f"{path} is missing or has been changed (expected {len(data)} bytes). Tune the folder again."
        )
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(CoterieError, match="has sha256"):
            composer.load(tmp_path / "copy", verify=True)

    def test_an_export_to_another_family(self, tuned: dict[str, Path]) -> None:
        from composer.export.exporting import plan_export

        with pytest.raises(
            BuildError, match="the base is of the family 'llama', FlexOlmo is exact for olmo2"
        ):
            plan_export(tuned["routers"], to="flex_olmo")
