"""Trackers: each has every step, in the folder `tracked`, and no result depends on them."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from stages import base, data
from stages.files import CHECKPOINTS, read_json, sha256
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


def in_tensorboard():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("tracked/sums")
    events.Reload()
    return [event.value for event in events.Scalars("loss")]


def in_trackio():
    with sqlite3.connect("tracked/sums.db") as file:
        rows = file.execute("SELECT metrics FROM metrics ORDER BY step").fetchall()
    return [found["loss"] for (text,) in rows if "loss" in (found := json.loads(text))]


def train():
    """The hash of what a process of its own trained, since Trackio asks for its folder once."""
    command = [sys.executable, "-m", "stages.train", "sums"]
    subprocess.run(command, check=True, capture_output=True, env={"PYTHONPATH": ":".join([str(ROOT), *sys.path])})
    return sha256([CHECKPOINTS / "sums" / "adapter_model.safetensors"])


@pytest.mark.parametrize(("tracker", "tracked"), [("tensorboard", in_tensorboard), ("trackio", in_trackio)])
def test_a_tracker_has_every_step(project, tracker, tracked):
    pytest.importorskip(tracker, reason=f"an extra that most do not need: uv sync --extra {tracker}")
    base.main()
    data.main("sums")
    plain = train()
    text = Path("params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(f"track: {tracker}\n{text}", encoding="utf-8")
    assert train() == plain
    curve = read_json(Path("reports/train/sums.curve.json"))
    assert tracked() == pytest.approx([point["loss"] for point in curve], abs=1e-5)
