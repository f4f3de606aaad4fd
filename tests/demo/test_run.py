import json
import stat
from dataclasses import replace

import pytest
import torch

from experts.errors import DataError, TrainingError
from pipelines.demo import run_demo
from pipelines.demo.settings import FULL, QUICK
from registry import Registry

OWNERS = ("acme", "bob", "zoe")
DOMAINS = [f"letters of {owner}" for owner in OWNERS]


def test_report_has_the_promised_names(demo):
    report = json.loads((demo.out / "report.json").read_text())
    arms = {"anchor", "weight_average", "composed"}
    for owner in OWNERS:
        arms |= {f"expert:{owner}/letters", f"composed-without:{owner}", f"never-joined:{owner}"}
    assert set(report["nll"]) == arms
    assert all(list(row) == DOMAINS for row in report["nll"].values())
    assert all(0 < value < 20 for row in report["nll"].values() for value in row.values())
    assert set(report["verify_optout"]) == {"build", "load", "request"}
    assert list(report["stages"]) == [
        *("download", "base", "train", "register", "build", "evaluate", "verify", "generate"),
    ]
    for stage in report["stages"].values():
        assert set(stage) == {"seconds", "peak_rss_mb"}
        assert stage["peak_rss_mb"] > 10
    assert list(report["unseen"]) == ["anchor", "composed"]
    assert set(report["routing"]) == {*DOMAINS, "noise"}


def test_every_arm_is_what_it_says(demo, demo_inputs):
    """Against models loaded and merged here, run whole and without the shared states."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import composer
    from pipelines.evaluate import evaluate

    tokenizer = AutoTokenizer.from_pretrained(demo_inputs.anchor)
    data = {owner.domain: owner.held_out for owner in demo_inputs.owners}

    def scores(model, **settings):
        result = evaluate(model, tokenizer, data, sequence_length=16, max_tokens=48, **settings)
        return {domain: pytest.approx(score.nll, rel=1e-4) for domain, score in result.domains.items()}

    nll = demo.report.nll
    anchor = AutoModelForCausalLM.from_pretrained(demo_inputs.anchor, dtype=torch.float32)
    assert nll["anchor"] == scores(anchor)
    composed = composer.load(demo.out / "composed", dtype="float32")
    assert nll["composed"] == scores(composed)
    assert nll["composed-without:bob"] == scores(composed, opt_out={"bob"})
    assert nll["never-joined:bob"] == scores(composer.load(demo.out / "composed", opt_out={"bob"}))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers
def test_single_experts_and_average_are_those_of_peft(demo, demo_inputs):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipelines.evaluate import evaluate

    tokenizer = AutoTokenizer.from_pretrained(demo_inputs.anchor)
    data = {owner.domain: owner.held_out for owner in demo_inputs.owners}
    names = [owner.name for owner in demo_inputs.owners]

    def load(first):
        anchor = AutoModelForCausalLM.from_pretrained(demo_inputs.anchor, dtype=torch.float32)
        return PeftModel.from_pretrained(
            anchor, demo.out / "experts" / first, adapter_name=first.replace("/", "-")
        )

    def check(model, arm):
        result = evaluate(model.eval(), tokenizer, data, sequence_length=16, max_tokens=48)
        expected = {domain: pytest.approx(score.nll, rel=1e-4) for domain, score in result.domains.items()}
        assert demo.report.nll[arm] == expected

    check(load(names[1]), f"expert:{names[1]}")
    model = load(names[0])
    for name in names[1:]:
        model.load_adapter(demo.out / "experts" / name, adapter_name=name.replace("/", "-"))
    adapters = [name.replace("/", "-") for name in names]
    # "cat" adds the products B A themselves, so this is the average of the updates
    model.add_weighted_adapter(adapters, [1 / 3] * 3, "average", combination_type="cat")
    model.set_adapter("average")
    check(model, "weight_average")


def test_opting_out_is_never_having_joined(demo):
    assert demo.report.verify_optout["build"] == 0
    assert demo.report.verify_optout["load"] == 0
    assert demo.report.verify_optout["request"] <= 1e-5
    for owner in OWNERS:
        assert demo.report.nll[f"composed-without:{owner}"] == pytest.approx(
            demo.report.nll[f"never-joined:{owner}"], abs=1e-5
        )


def test_text_stays_with_its_owner(demo, demo_inputs):
    owners = demo.out / "owners"
    assert stat.S_IMODE((owners / "bob").stat().st_mode) == 0o700
    text = demo_inputs.owners[1].training[0].encode()
    holders = {path for path in demo.out.rglob("*") if path.is_file() and text in path.read_bytes()}
    assert holders == {owners / "bob" / "training.jsonl"}


def test_everything_stands_in_the_folder(demo):
    registry = Registry(demo.out / "registry")
    assert [record.name for record in registry.experts()] == [f"{owner}/letters" for owner in OWNERS]
    card = registry.card("bob/letters")
    assert (card.domain, card.license) == ("letters of bob", "Apache-2.0")
    assert card.training.data_statement == "Letters of bob."
    for name in ("manifest.yaml", "report.md", "nll.png", "routing.png", "composed/composition.json"):
        assert (demo.out / name).stat().st_size > 100


def test_the_job_files_train_again(demo, tmp_path):
    from pipelines.train import DomainJob, train_job

    job = DomainJob.from_file(demo.out / "owners" / "zoe" / "job.yaml")
    again = train_job(job, out=tmp_path / "again", registry=Registry(demo.out / "registry"), version=1)
    first = (demo.out / "experts" / "zoe" / "letters" / "adapter_model.safetensors").read_bytes()
    assert (again / "adapter_model.safetensors").read_bytes() == first


def test_prints_tables_samples_and_figures(demo):
    lines = demo.printed.splitlines()
    assert [line.split(":")[0] for line in lines if line.endswith(" s")][:3] == [
        "Anchor and texts",
        "The public anchor enters the registry",
        "Each owner trains on text that stays apart",
    ]
    assert any(line.strip().startswith("weight_average") for line in lines)
    assert "With acme" in demo.printed
    assert "Without acme" in demo.printed
    figures = demo.report.figures()
    reached = sum(figure.reached for figure in figures)
    assert sum(line.startswith(("reached: ", "NOT REACHED: ")) for line in lines) == len(figures)
    assert f"{reached} of {len(figures)} figures reached. Report: " in demo.printed.replace("\n", " ")


def test_samples_continue_the_prompt(demo, demo_inputs):
    for sample, owner in zip(demo.report.samples, demo_inputs.owners, strict=True):
        assert (sample.owner, sample.prompt) == (owner.owner, owner.prompt)
        page = (demo.out / "report.md").read_text()
        assert f"With {owner.owner}:\n\n" in page


def test_refuses_a_folder_of_somebody_else(tmp_path, demo_inputs):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(DataError) as caught:
        run_demo(tmp_path, inputs=demo_inputs)
    assert str(caught.value) == (
        f"'{tmp_path}' exists and was not made by the demo. Choose another folder with --out, or remove it."
    )
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_failed_job_leaves_no_report_and_can_be_repeated(tmp_path, demo, demo_inputs):
    from pipelines.demo.run import MARKER

    broken = replace(demo_inputs.owners[0], training=("!",))
    inputs = replace(demo_inputs, owners=(broken, *demo_inputs.owners[1:]))
    for _ in range(2):  # the second run replaces what the first one left
        with pytest.raises(TrainingError) as caught:
            run_demo(tmp_path / "out", inputs=inputs, settings=demo.settings)
        assert str(caught.value) == (
            "1 of 3 jobs failed.\n  - acme/letters: the training text does not fill one window of 16 tokens. Give "
            "more text or a smaller sequence_length."
        )
        assert (tmp_path / "out" / MARKER).is_file()
        assert not (tmp_path / "out" / "report.json").exists()


def test_quick_is_smaller_in_every_size():
    for size in ("steps", "public_windows", "measured_windows", "new_tokens"):
        assert getattr(QUICK, size) < getattr(FULL, size)
