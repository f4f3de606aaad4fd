"""The adapter for lm-evaluation-harness: its arguments, and a task from local files against a loop by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
# the harness's own dependencies warn at import
pytestmark = pytest.mark.filterwarnings("ignore")

QUESTIONS = [
    {"question": "!#%", "choices": ["'()", "STU", "abc"], "answer": 0},
    {"question": "@AB", "choices": ["!!!", "XYZ", "def"], "answer": 1},
    {"question": "xyz", "choices": ["123", "KLM", "ghi"], "answer": 2},
]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with one multiple-choice task on a local file."""
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "local.yaml").write_text(
        f"""
task: local_questions
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
  cache_dir: {tmp_path / "cache"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
    )
    return tmp_path


def _by_hand(folder: Path, opt_out: set[str]) -> tuple[list[list[float]], float]:
    """Log-likelihood of every choice, and the share of questions whose best choice is the answer."""
    from transformers import AutoTokenizer

    from composer.loading import load

    model, tokenizer = load(folder, opt_out=opt_out), AutoTokenizer.from_pretrained(folder)
    rows = []
    for question in QUESTIONS:
        row = []
        for choice in question["choices"]:
            given = tokenizer(question["question"]).input_ids
            ids = torch.tensor([given + tokenizer(choice).input_ids])
            with torch.inference_mode():
                logs = model(ids).logits.log_softmax(-1)[0]
            row.append(sum(float(logs[i - 1, ids[0, i]]) for i in range(len(given), ids.shape[1])))
        rows.append(row)
    right = [row.index(max(row)) == q["answer"] for row, q in zip(rows, QUESTIONS, strict=True)]
    return rows, sum(right) / len(right)


@pytest.mark.parametrize("opt_out", ["", "acme+zoe"])
def test_a_task_from_local_files(pico: Any, tasks: Path, opt_out: str) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import pipelines.integrations.lm_eval  # noqa: F401 - registers the model

    folder = pico.composed("mixed")
    results = lm_eval.simple_evaluate(
        model="coterie",
        model_args=f"pretrained={folder},opt_out={opt_out},dtype=float32",
        tasks=["local_questions"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
    )
    expected, accuracy = _by_hand(folder, set(opt_out.split("+")) - {""})
    samples = sorted(results["samples"]["local_questions"], key=lambda sample: sample["doc_id"])
    got = [[value for (value, _greedy) in sample["filtered_resps"]] for sample in samples]
    for one, other in zip(got, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert results["results"]["local_questions"]["acc,none"] == pytest.approx(accuracy)
    assert results["config"]["opt_out"] == sorted(set(opt_out.split("+")) - {""})
    assert results["config"]["owners"] == sorted({"acme", "bob", "zoe"} - set(opt_out.split("+")))


def test_opting_out_changes_the_answers(pico: Any) -> None:
    """The control of the test above."""
    whole, _ = _by_hand(pico.composed("mixed"), set())
    without, _ = _by_hand(pico.composed("mixed"), {"acme", "zoe"})
    assert any(
        abs(a - b) > 1e-2 for x, y in zip(whole, without, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_harnesses_default_device_needs_no_gpu(pico: Any) -> None:
    from pipelines.integrations.lm_eval import CoterieLM

    assert CoterieLM(str(pico.composed("mixed")), device="cuda:0").device.type == "cpu"


def test_a_registrys_opt_outs_are_followed(pico: Any) -> None:
    from pipelines.integrations.lm_eval import CoterieLM

    registry = pico.fresh_library()
    registry.opt_out("bob", reason="the contract ended")
    model = CoterieLM(str(pico.composed("mixed")), registry=str(registry.path), device="cpu")
    assert model.opt_out == ("bob",)
    assert model.max_length == 128


@pytest.mark.parametrize(
    ("given", "owners"),
    [
        ("", set()),
        (None, set()),
        ("acme", {"acme"}),
        ("acme+bob", {"acme", "bob"}),
        (42, {"42"}),
        (["a"], {"a"}),
        ({"a": 1}.keys(), {"a"}),
    ],
)
def test_owners(given: object, owners: set[str]) -> None:
    from pipelines.integrations.lm_eval import owners_of

    assert owners_of(given) == owners


def test_an_iterator_is_refused() -> None:
    from experts.errors import OptOutError
    from pipelines.integrations.lm_eval import owners_of

    with pytest.raises(OptOutError, match=r"^opt_out is or holds a 'map', which is no collection"):
        owners_of(map(str.strip, ["acme"]))


def test_mistakes_are_named(pico: Any) -> None:
    from experts.errors import BuildError, UnknownNameError
    from pipelines.integrations.lm_eval import CoterieLM

    folder = str(pico.composed("mixed"))
    with pytest.raises(UnknownNameError) as caught:
        CoterieLM(folder, opt_out="acme+bop")
    assert str(caught.value) == "Unknown owner 'bop'. Did you mean 'bob'? Known: acme, bob, zoe."
    with pytest.raises(
        UnknownNameError, match=r"^Unknown model argument 'optout'\. Did you mean 'opt_out'\?"
    ):
        CoterieLM(folder, optout="acme")
    with pytest.raises(BuildError, match="is not a composed folder"):
        CoterieLM(str(pico.base("llama")))
