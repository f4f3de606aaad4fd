import json
import subprocess
import sys
import time

import pytest

from pipelines.demo.stages import Stages

# a process of its own: what other tests took or gave back must not show
_TWO_STAGES = """
import json, time
from pipelines.demo.stages import Stages
stages = Stages()
with stages("small"):
    time.sleep(0.05)
with stages("large"):
    block = bytearray(b"x") * 60_000_000
    time.sleep(0.5)
print(json.dumps(stages.to_dict()))
"""


def test_seconds_and_peak_memory_belong_to_their_stage():
    done = subprocess.run([sys.executable, "-c", _TWO_STAGES], capture_output=True, text=True, check=True)
    stages = json.loads(done.stdout)
    assert list(stages) == ["small", "large"]
    assert 0.05 <= stages["small"]["seconds"] < 5
    assert stages["large"]["peak_rss_mb"] > stages["small"]["peak_rss_mb"] + 40


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
