"""Several jobs: outcomes, what is kept, what an agent may say, and the gate at the owner's door."""

from __future__ import annotations

import pytest

from experts.errors import AdmissionError, CoterieError, ManifestError, TrainingError
from pipelines.train.agent import Order, release
from pipelines.train.anchor import ResolvedBase, resolve_base
from pipelines.train.hub import _Agent, _outcomes, raise_failures, train_jobs
from pipelines.train.planning import Task
from pipelines.train.progress import Progress
from pipelines.train.worker import train_job


@pytest.fixture
def jobs(make_job):
    return [make_job(steps=2), make_job(steps=2, name="bell/code")]


def test_jobs_run_one_after_the_other_and_one_failure_does_not_stop_the_rest(make_job, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{}\n")
    jobs = [make_job(steps=2, name="zoe/a", data=str(broken)), make_job(steps=2)]
    reports = []
    outcomes = train_jobs(jobs, out_dir=tmp_path / "out", runner="local", progress=reports.append, threads=1)
    failed, done = outcomes
    assert (failed.name, failed.folder, failed.error) == ("zoe/a", None, "DataError")
    assert failed.message == (
        'broken.jsonl, line 1: no string under "text". Write {"text": "..."} on every line.'
    )
    assert done.folder == tmp_path / "out" / "acme" / "contracts"
    assert (done.folder / "card.json").exists()
    assert [(r.name, r.stage) for r in reports if r.final] == [
        ("zoe/a", "failed"),
        ("acme/contracts", "done"),
    ]
    with pytest.raises(TrainingError) as caught:
        raise_failures(outcomes)
    assert str(caught.value) == (
        "1 of 2 jobs failed.\n"
        '  - zoe/a: broken.jsonl, line 1: no string under "text". Write {"text": "..."} on every line.'
    )
    assert caught.value.exit_code == 1
    raise_failures([done])


def test_repeating_the_call_trains_only_what_is_missing(jobs, make_job, texts, tmp_path):
    def stages(which):
        reports = []
        train_jobs(which, out_dir=tmp_path / "out", runner="local", progress=reports.append, threads=1)
        return [(r.name, r.stage) for r in reports if r.stage in ("training", "done")]

    assert stages(jobs[:1])[-1] == ("acme/contracts", "done")
    again = stages(jobs)
    assert [entry for entry in again if entry[0] == "acme/contracts"] == [("acme/contracts", "done")]
    assert ("bell/code", "training") in again
    other_text = make_job(steps=2, data=str(texts["code"]))
    with pytest.raises(CoterieError, match=r"contracts' exists already\. Choose another folder"):
        stages([other_text])


def test_two_jobs_of_one_name(jobs, tmp_path):
    with pytest.raises(ManifestError) as caught:
        train_jobs([jobs[0], jobs[1], jobs[0]], out_dir=tmp_path / "out", runner="local")
    assert str(caught.value) == ("Several jobs train acme/contracts. Give each expert a name of its own.")


def test_no_job(tmp_path):
    with pytest.raises(ManifestError) as caught:
        train_jobs([], out_dir=tmp_path, runner="local")
    assert str(caught.value) == "There is no job to train. Name one job file at least."


def test_everything_is_checked_before_anything_starts(jobs, make_job, tmp_path):
    reports = []
    bad = make_job(name="bell/code", layers="9")
    with pytest.raises(
        ManifestError, match=r"^layers: layer 9 does not exist; the base has layers 0 to 3\.$"
    ):
        train_jobs([jobs[0], bad], out_dir=tmp_path / "out", runner="ray", progress=reports.append)
    assert reports == []


@pytest.fixture
def agent(jobs, tmp_path):
    tasks = [Task(job=job, base=None, out=tmp_path / job.name, version=1, device="cpu") for job in jobs]
    return _Agent(
        tasks=tasks, folder=tmp_path, process=None, latest=[Progress(name=t.job.name) for t in tasks]
    )


def test_an_agents_lines_may_arrive_in_pieces(agent):
    line = b'1 {"stage":"training","scalars":{"step":1},"error":null}\n'
    assert list(agent.feed(line[:20])) == []
    assert list(agent.feed(line[20:])) == [Progress(name="bell/code", stage="training", scalars={"step": 1})]


@pytest.mark.parametrize(
    "line",
    [
        b"canary\n",
        b'0 {"stage":"done","scalars":{"canary":1},"error":null}\n',
        b'7 {"stage":"done","scalars":{},"error":null}\n',
        b'-1 {"stage":"done","scalars":{},"error":null}\n',
        b'0 {"stage":"done","scalars":{},"error":"canary"}\n',
        b"\xff\n",
    ],
)
def test_an_agent_that_says_anything_else_is_not_believed(agent, line, tmp_path):
    assert list(agent.feed(line)) == []
    (tmp_path / "acme" / "contracts").mkdir(parents=True)
    assert list(agent.feed(b'0 {"stage":"done","scalars":{},"error":null}\n')) != []
    outcome = next(iter(_outcomes(agent)))
    assert (outcome.folder, outcome.error) == (None, "ValueError")


def test_a_job_whose_agent_died_has_failed(agent):
    outcomes = list(_outcomes(agent))
    assert [(o.folder, o.error) for o in outcomes] == [(None, "TrainingError")] * 2


@pytest.fixture
def order(make_job, tmp_path):
    job = make_job(steps=2)
    with resolve_base(job.base) as base:
        train_job(job, out=tmp_path / "outbox", base=base, threads=1)
        yield Order(job=job, base=base, out=tmp_path / "delivered", version=1)


def test_the_gate_delivers_an_expert(order, tmp_path):
    release(order, outbox=tmp_path / "outbox")
    assert (order.out / "card.json").exists()
    assert not (tmp_path / "outbox").exists()


def test_the_gate_keeps_anything_else_back(order, tmp_path):
    (tmp_path / "outbox" / "notes.txt").write_text("canary")
    with pytest.raises(AdmissionError, match=r"notes\.txt"):
        release(order, outbox=tmp_path / "outbox")
    assert not order.out.exists()
    assert list(tmp_path.glob(".*")) == []


def test_the_gate_keeps_another_expert_back(order, make_job, tmp_path):
    other = Order(job=make_job(name="bell/code"), base=order.base, out=order.out, version=1)
    with pytest.raises(TrainingError) as caught:
        release(other, outbox=tmp_path / "outbox")
    assert str(caught.value) == "The outbox of bell/code holds another expert, acme/contracts@1."
    assert not order.out.exists()


def test_a_resolved_base_survives_the_way_to_another_process(anchor):
    with resolve_base(anchor()) as base:
        assert ResolvedBase.from_json(base.to_json()) == base
