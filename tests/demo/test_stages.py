import time

import numpy as np
import pytest

from pipelines.demo.stages import Stages


def test_seconds_and_peak_memory_belong_to_their_stage():
    stages = Stages()
    with stages("small"):
        time.sleep(0.05)
    with stages("large"):
        block = np.ones(60_000_000, dtype=np.uint8)
        time.sleep(0.5)
        del block
    assert list(stages.to_dict()) == ["small", "large"]
    assert 0.05 <= stages.seconds["small"] < 5
    assert stages.peak_rss_mb["large"] > stages.peak_rss_mb["small"] + 40


def test_a_stage_that_fails_is_measured_and_raises():
    stages = Stages()
    with pytest.raises(KeyError), stages("broken"):
        raise KeyError("x")
    assert stages.seconds["broken"] > 0


def test_the_same_stage_adds_up():
    stages = Stages()
    for _ in range(2):
        with stages("twice"):
            time.sleep(0.03)
    assert stages.seconds["twice"] >= 0.06
