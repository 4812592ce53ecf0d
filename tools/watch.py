"""The loss of the stage in training, drawn as it goes: `strata watch`."""

import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from stages.errors import MistakeError
from stages.files import REPORTS, read_json
from stages.project.params import Params, load_params

SECONDS = 1  # between two looks
LINES = 18
CLEAR = "\x1b[H\x1b[2J"


def add_arguments(parser: ArgumentParser) -> None:
    """Which stage."""
    parser.add_argument("stage", nargs="?", help="a stage of params.yaml; the one that trains now, or trained last")


def main(stage: str | None) -> None:
    """Draw the curve until its last step; once where the output is no terminal.

    Raises:
        MistakeError: there is no such stage, or no curve of it.
    """
    settings = load_params()
    if stage:
        settings.find("stages", stage)
    while True:
        name = stage or latest(settings)
        curve: list[dict[str, Any]] = read_json(path(name), list) if name and path(name).exists() else []
        if not curve and not sys.stdout.isatty():
            raise MistakeError(
                f"no curve of {stage or 'any stage'} is there; it comes with the first steps of dvc repro"
            )
        text = drawn(name, curve, settings) if name and curve else "no step is done yet"
        print(f"{CLEAR}{text}" if sys.stdout.isatty() else text, flush=True)
        if not sys.stdout.isatty() or (stage and is_ended(stage, curve, settings)):
            return
        time.sleep(SECONDS)


def path(stage: str) -> Path:
    """The file of a stage's curve, which training writes as it goes."""
    return REPORTS / "train" / f"{stage}.curve.json"


def latest(settings: Params) -> str | None:
    """The stage whose curve was written last."""
    written = [stage for stage in settings.stages if path(stage).exists()]
    return max(written, key=lambda stage: path(stage).stat().st_mtime, default=None)


def is_ended(stage: str, curve: list[dict[str, Any]], settings: Params) -> bool:
    """Whether its last step is done, as far as params.yaml knows."""
    return bool(curve) and curve[-1]["step"] >= getattr(settings.stages[stage], "steps", 0)


def drawn(stage: str, curve: list[dict[str, Any]], settings: Params) -> str:
    """The curve in letters, with the tuning loss where there is one."""
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(None, LINES)
    for key, label in (("loss", "loss"), ("tuning_loss", "on the tuning split")):
        points = [point for point in curve if key in point]
        if points:
            steps, losses = [point["step"] for point in points], [point[key] for point in points]
            plotext.plot(steps, losses, marker="braille", label=label if len(points) < len(curve) else None)
    plotext.xlabel("step")
    last, total = curve[-1], getattr(settings.stages[stage], "steps", None)
    plotext.title(f"{stage}: step {last['step']} of {total}, loss {last['loss']:.3f}")
    return str(plotext.build())
