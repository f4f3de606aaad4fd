"""Job files: every mistake at once, paths relative to the file, defaults that a reader can rely on."""

from __future__ import annotations

from pathlib import Path

import pytest

from experts.errors import ManifestError
from pipelines.train.job import DomainJob
from pipelines.train.layer_choice import parse_layers


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "law.jsonl").write_text('{"text": "hereby"}\n')
    (tmp_path / "web.txt").write_text("the river")
    return tmp_path


def _yaml(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


MINIMAL = "name: acme/contracts\ndomain: law\nlicense: Apache-2.0\nbase: smollm2\ndata: law.jsonl\n"


def test_a_minimal_job_and_its_defaults(folder):
    job = DomainJob.from_file(_yaml(folder, MINIMAL))
    assert job.owner == "acme"
    assert job.data == (folder / "law.jsonl",)
    assert job.base_path is None
    assert job.directory == folder / ".coterie" / "acme--contracts"
    assert (job.kind, job.layers, job.rank) == ("lora", "upper-half", 16)
    assert job.statistics.enabled
    assert job.statistics.normalization == "rms"
    assert not job.coordination.enabled
    assert job.public_fraction == 0
    assert job.weight_decay == 0


def test_paths_are_relative_to_the_file_and_switches_may_be_bare(folder):
    text = MINIMAL.replace("smollm2", "./anchor") + (
        "public: [web.txt]\npublic_fraction: 0.25\nheld_out: web.txt\nstatistics: false\ncoordination: true\n"
        "bias: false\nworkdir: private\n"
    )
    job = DomainJob.from_file(_yaml(folder, text))
    assert job.base_path == folder / "anchor"
    assert job.public == (folder / "web.txt",)
    assert job.held_out == folder / "web.txt"
    assert job.workdir == folder / "private"
    assert (job.statistics.enabled, job.coordination.enabled, job.bias.enabled) == (False, True, False)


def test_every_field_has_a_docstring():
    missing = [name for name, field in DomainJob.model_fields.items() if not field.description]
    assert missing == []


def test_all_mistakes_at_once(folder):
    text = (
        "name: acme\ndomian: law\nlicense: Apache 2\nbase: x\nkind: lorra\nlayers: 9-3\ndata: [a.jsonl, law.pdf]\n"
        "rank: '16'\nsteps: 0\ncoordination: {enabledd: true}\nstatistics: {normalization: l2}\nheld_out: 0.9\n"
        "row_init: nowhere\n"
    )
    with pytest.raises(ManifestError) as caught:
        DomainJob.from_file(_yaml(folder, text))
    allowed = ", ".join(sorted(DomainJob.model_fields))
    assert str(caught.value) == (
        "job job.yaml has 13 problems:\n"
        "  - name: 'acme' is not an expert name: write owner/expert, for instance 'acme/contracts', each part 1 to "
        "64 lower-case letters, digits, '_', '.' or '-', starting with a letter or digit.\n"
        "  - domain: missing\n"
        "  - license: 'Apache 2' is not an SPDX licence expression; write for instance 'Apache-2.0' or, for terms "
        "of your own, 'LicenseRef-<name>'. unknown licence 'Apache 2'; did you mean 'Apache-2.0'?\n"
        "  - kind: Unknown trainer 'lorra'. Did you mean 'lora'? Known: dense, ffn, lora, retriever.\n"
        "  - layers: '9-3' is not a choice of layers; write all, upper-half, ranges such as 15-29 or 3,7-9, or a "
        "list of numbers\n"
        "  - rank: input should be a valid integer, given '16'\n"
        f"  - data: 'law.pdf' does not end in .jsonl or .txt; there is no file '{folder / 'a.jsonl'}'\n"
        "  - held_out: a share must lie between 0 and 0.5, given 0.9\n"
        "  - steps: input should be greater than 0, given 0\n"
        "  - statistics.normalization: input should be 'none' or 'rms', given 'l2'\n"
        "  - coordination.enabledd: unknown key; did you mean 'enabled'? Allowed: enabled, router_z_loss, "
        "softmax_z_loss\n"
        f"  - row_init: '{folder / 'nowhere'}' is neither 'anchor' nor 'random' nor the folder of a "
        "SentenceTransformer (no modules.json in it)\n"
        f"  - domian: unknown key; did you mean 'domain'? Allowed: {allowed}"
    )


def test_fields_that_contradict_each_other(folder):
    text = MINIMAL + "owner: bell\npublic_fraction: 0.5\nrow_negatives: 1.0\n"
    with pytest.raises(ManifestError) as caught:
        DomainJob.from_file(_yaml(folder, text))
    assert str(caught.value) == (
        "job job.yaml has 1 problem:\n"
        "  - owner 'bell' is not the owner in the name 'acme/contracts'; leave it out; public_fraction is 0.5 but no "
        "public text is given; row_negatives needs coordination and a public_fraction above 0"
    )


def test_a_file_that_is_no_mapping(folder):
    with pytest.raises(ManifestError) as caught:
        DomainJob.from_file(_yaml(folder, "- name\n"))
    assert str(caught.value) == (
        "job job.yaml: a mapping of fields is expected, such as 'name: acme/contracts'."
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("all", (0, 1, 2, 3, 4)),
        ("upper-half", (2, 3, 4)),
        ("1-3", (1, 2, 3)),
        ("4", (4,)),
        ("0, 2-3", (0, 2, 3)),
        ((3, 1), (1, 3)),
    ],
)
def test_choices_of_layers(given, expected):
    assert parse_layers(given, num_layers=5) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("3-5", "layers: layer 5 does not exist; the base has layers 0 to 4."),
        ("0-999999999999", "layers: layer 999999999999 does not exist; the base has layers 0 to 4."),
        ((), "layers: choose at least one layer."),
        (
            "top",
            "layers: 'top' is not a choice of layers; write all, upper-half, ranges such as 15-29 or 3,7-9, or a "
            "list of numbers.",
        ),
    ],
)
def test_layers_that_do_not_exist(given, message):
    with pytest.raises(ManifestError) as caught:
        parse_layers(given, num_layers=5)
    assert str(caught.value) == message


def test_the_digest_follows_what_is_trained_and_nothing_else(folder):
    job = DomainJob.from_file(_yaml(folder, MINIMAL))
    elsewhere = job.model_copy(
        update={"data": (Path("other.txt"),), "workdir": Path("w"), "description": "new"}
    )
    assert elsewhere.digest() == job.digest()
    assert job.model_copy(update={"seed": 1}).digest() != job.digest()


def test_a_job_survives_the_way_to_another_process(folder):
    text = MINIMAL + "held_out: web.txt\nlayers: [3, 1]\nlearning_rate: 1.0e-3\n"
    job = DomainJob.from_file(_yaml(folder, text))
    assert DomainJob.model_validate_json(job.model_dump_json()) == job


def test_the_card_gets_no_path(folder):
    text = MINIMAL + "coordination: true\n"
    job = DomainJob.from_file(_yaml(folder, text)).model_copy(update={"row_init": folder / "encoder"})
    assert job.card_settings()["row_init"] == "sentence-transformer"
    assert str(folder) not in repr(job.card_settings())
