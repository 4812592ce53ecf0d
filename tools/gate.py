"""Whether the merged model may pass: `strata gate`, with exit code 1 where it may not.

What decides is the 95 % interval of what was measured, and not the number itself: a rule is broken where the whole
interval lies beyond its limit, held where none of it does, and else it cannot be told with so few questions.
"""

from argparse import ArgumentParser
from typing import Any, NamedTuple

from stages.errors import MistakeError
from stages.files import REPORTS, read_json
from stages.project.params import load_params
from stages.settings.gate import Gate

PASSES, FAILS, UNCLEAR = "passes", "fails", "unclear"


class Ruling(NamedTuple):
    """What became of one rule, and a sentence about it."""

    verdict: str
    text: str


def add_arguments(_: ArgumentParser) -> None:
    """Nothing to say."""


def main() -> None:
    """Print a sentence for each rule.

    Raises:
        MistakeError: the evaluation is not there, or a rule is broken.
    """
    params, path = load_params(), REPORTS / "evaluation.json"
    if not path.exists():
        raise MistakeError(f"{path} is missing; run `dvc repro`")
    evaluation = read_json(path)
    guards = [each for each in params.guards if each in evaluation["measures"]]
    rulings = [rule_guard(evaluation, name, params.gate) for name in guards]
    rulings += [rule_skill(evaluation, name, params.gate) for name in params.merge.weights]
    for ruling in rulings:
        print(f"{ruling.verdict}: {ruling.text}")
    if broken := sum(ruling.verdict == FAILS for ruling in rulings):
        raise MistakeError(f"the merged model breaks {broken} of the {len(rulings)} rules of gate in params.yaml")


def rule_guard(evaluation: dict[str, Any], name: str, gate: Gate) -> Ruling:
    """Whether the merged model lost too much of a dataset that no stage learns.

    Args:
        evaluation: content of reports/evaluation.json.
        name: of the dataset.
        gate: of params.yaml.
    """
    (found,) = [each for each in evaluation["comparisons"] if (each["model"], each["dataset"]) == ("merged", name)]
    if not found["before"]:
        return Ruling(PASSES, f"{name} has nothing to lose, for the base scores 0")
    change, low, high = (number / found["before"] for number in (found["difference"], *found["interval"]))
    allowed = gate.lost if found["measure"] == "loss" else -gate.lost
    text = (
        f"{name}'s {found['measure']} went from {found['before']:.3g} to {found['after']:.3g}, {change:+.1%}"
        f" ({low:+.1%} to {high:+.1%}); {allowed:+.1%} is allowed"
    )
    if found["measure"] == "loss":
        return Ruling(_verdict(high <= allowed, low > allowed), text)
    return Ruling(_verdict(low >= allowed, high < allowed), text)


def rule_skill(evaluation: dict[str, Any], name: str, gate: Gate) -> Ruling:
    """Whether the merged model keeps enough of what stage `name` gained on its own dataset."""
    found = evaluation["retention"][name]
    if found["interval"] is None:
        return Ruling(FAILS, f"{name} learned nothing of {found['dataset']} that is more than chance")
    low, high = found["interval"]
    text = f"{found['retention']:.0%} ({low:.0%} to {high:.0%}) of what {name} learned is kept; {gate.kept:.0%} must be"
    return Ruling(_verdict(low >= gate.kept, high < gate.kept), text)


def _verdict(holds: bool, is_broken: bool) -> str:
    return PASSES if holds else FAILS if is_broken else UNCLEAR
