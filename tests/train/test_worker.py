from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("kind", ["lora", "ffn"])
def test_trains_every_family(make_job, tmp_path, family, kind):
    from pipelines.train.worker import train_job

    seen = []
    out = train_job(make_job(family, kind=kind), out=tmp_path / "out", progress=seen.append, threads=1)
    card = json.loads((out / "card.json").read_text())
    assert card["layers"] == [2, 3]
    assert seen[-1].stage == "done"
