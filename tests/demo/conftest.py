"""A whole demo on a pico anchor, run once: three owners, letters of their own, three steps of training."""

from __future__ import annotations

import io
import random
from types import SimpleNamespace

import pytest

from pipelines.demo import DemoInputs, DemoOwner, DemoSettings

LETTERS = {"acme": "!#$%&'()", "bob": "9:;<=>?@", "zoe": "STUVWXYZ"}
SIZES = DemoSettings(
    steps=3,
    batch_size=2,
    sequence_length=16,
    rank=2,
    public_windows=12,
    measured_windows=3,
    new_tokens=4,
    runner="local",
)


def _texts(letters, *, seed, documents=8):
    draw = random.Random(seed)
    return tuple("".join(draw.choice(letters) for _ in range(90)) for _ in range(documents))


@pytest.fixture(scope="session")
def demo_inputs(pico):
    """Anchor and texts; each owner's letters appear in nobody else's text."""
    everything = "".join(LETTERS.values())
    owners = tuple(
        DemoOwner(
            owner=owner,
            expert="letters",
            domain=f"letters of {owner}",
            statement=f"Letters of {owner}.",
            prompt=letters[:3],
            training=_texts(letters, seed=1),
            held_out=_texts(letters, seed=2),
        )
        for owner, letters in LETTERS.items()
    )
    return DemoInputs(
        base_name="pico",
        anchor=pico.base("llama"),
        owners=owners,
        public=_texts(everything, seed=3),
        unseen={"noise": _texts(everything, seed=4)},
    )


@pytest.fixture(scope="session")
def demo(demo_inputs, tmp_path_factory):
    """The finished run: its folder, its report and what it printed."""
    from rich.console import Console

    from pipelines.demo import run_demo

    out = tmp_path_factory.mktemp("demo") / "out"
    screen = io.StringIO()
    console = Console(file=screen, width=140)
    report = run_demo(out, inputs=demo_inputs, settings=SIZES, console=console)
    return SimpleNamespace(out=out, report=report, printed=screen.getvalue(), settings=SIZES)
