"""What `dvc repro` would do now, and why: `strata plan`.

DVC says of each stage whether its own inputs changed; here the answer goes on down the pipeline. What the run cache has
is looked up. Of what runs, other settings or other inputs give another result; code or a version that was touched may
give the same one, and then nothing after it runs: such stages are told as `perhaps`.
"""

import copy
import json
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from stages.errors import TIMES, MistakeError, first_line
from stages.files import CHECKPOINTS, PICKED
from stages.project.check import load_checked
from stages.project.params import PARAMS, Params
from stages.settings.stage import Training
from tools.terminal import duration, size

RUNS, CACHED, PERHAPS = "runs", "cached", "perhaps"
TITLES = {RUNS: "Will run", CACHED: "Comes from the cache", PERHAPS: "Perhaps: if what they read becomes another"}
FORGIVING = {"evaluate", "threads", "score"}  # sections and keys that may change a result, and need not
WIDTH = 40  # letters of a value that are shown
REASONS = 2  # of a stage that are shown


class Reason(NamedTuple):
    """Why a stage is not up to date: it will run for it, or perhaps; `changes`: then its result will be another."""

    text: str
    changes: bool
    is_certain: bool = True


@dataclass(frozen=True)
class Step:
    """A stage that is not up to date: what becomes of it, and why.

    Attributes:
        seconds: of its last run, by the steps and examples that it has now; None where no earlier run tells.
        bytes: that its outputs took.
    """

    stage: str
    fate: str
    why: list[str]
    seconds: float | None
    bytes: int


def add_arguments(parser: ArgumentParser) -> None:
    """How it is told."""
    parser.add_argument("--json", action="store_true", dest="as_json", help="for programs")


def main(as_json: bool) -> None:
    """Print what would run.

    Raises:
        MistakeError: params.yaml has a mistake, or the folder is no project.
    """
    steps, total = plan()
    print(json.dumps([asdict(step) for step in steps], indent=1) if as_json else told(steps, total))


def told(steps: list[Step], total: int) -> str:
    """A plan in words, the stages by what becomes of them."""
    if not steps:
        return f"All {total} stages are up to date: nothing will run."
    lines = []
    for fate, title in TITLES.items():
        chosen = [step for step in steps if step.fate == fate]
        if chosen:
            width = max(len(step.stage) for step in chosen)
            lines += [f"{title}, {len(chosen)} of {total}:"]
            lines += [f"  {step.stage:<{width}}  {_time(step):>7}  {_why(step)}" for step in chosen]
    if running := [step for step in steps if step.fate == RUNS]:
        lines.append(_total(running, [step for step in steps if step.fate == PERHAPS]))
    return "\n".join(lines)


def _why(step: Step) -> str:
    """The first reasons of many, those of its own before those above it."""
    reasons = sorted(step.why, key=lambda reason: reason.startswith("after "))
    more = len(reasons) - REASONS
    return "; ".join([*reasons[:REASONS], f"and {more} more"] if more > 1 else reasons)


def _total(running: list[Step], perhaps: list[Step]) -> str:
    known = sum(step.seconds or 0 for step in running)
    untold = sum(step.seconds is None for step in running)
    rest = sum(step.seconds or 0 for step in perhaps)
    parts = [f"About {duration(known)}"] if untold < len(running) else []
    parts += [f"{untold} stages that never ran here"] if untold else []
    parts += [f"perhaps {duration(rest)} more"] if rest else []
    return f"{', '.join(parts)}; {size(sum(step.bytes for step in running))} on disk."


def _time(step: Step) -> str:
    return "" if step.fate == CACHED else "?" if step.seconds is None else duration(step.seconds)


def plan() -> tuple[list[Step], int]:
    """The stages that are not up to date, in the pipeline's order, and how many stages there are.

    Raises:
        MistakeError: params.yaml has a mistake, or DVC cannot read the project.
    """
    import networkx
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    settings = load_checked()
    try:
        with Repo(".") as repo, repo.lock:
            order = list(networkx.dfs_postorder_nodes(repo.index.graph))
            return list(_Plan(repo, settings).steps(order)), len(order)
    except DvcException as error:
        raise MistakeError(f"dvc cannot say what would run ({first_line(error)}); see dvc status") from None


class _Plan:
    """A walk down the pipeline.

    Attributes:
        known: of each output so far, what it will hash to, by path; None where only running tells.
        changed: outputs that will be others, and whether that is certain.
        newer: inputs that are others than those a stage ran on, though nothing above it is left to run.
    """

    def __init__(self, repo: Any, settings: Params) -> None:
        self.repo, self.settings, self.times = repo, settings, read_times()
        self.makers = {out.fs_path: stage.addressing for stage in repo.index.stages for out in stage.outs}
        self.worked = {
            each.addressing: self._work(each.addressing, _settings_before(each)) for each in repo.index.stages
        }
        self.is_made = cache(lambda path: any(_overlap(out, path) for out in self.makers))
        self.known: dict[str, Any] = {}
        self.changed: dict[str, bool] = {}
        self.newer: set[str] = set()

    def steps(self, order: list[Any]) -> Iterator[Step]:
        """From the first stage to the last."""
        for stage in order:
            reasons = [*self._reasons_above(stage), *self._own_reasons(stage)]
            found = self._look_up(stage) if reasons else None
            if reasons:
                fate = CACHED if found else RUNS if any(reason.is_certain for reason in reasons) else PERHAPS
                used = sum(out.meta.size or 0 for out in stage.outs if out.meta)
                why = [reason.text for reason in reasons]
                yield Step(stage.addressing, fate, why, self._seconds(stage), used)
            for out in stage.outs:
                before, path = out.hash_info, out.fs_path
                self.known[path] = found[path] if found else None if reasons else before
                if reasons and not (before and self.known[path] == before):
                    is_other = bool(found) or any(reason.changes for reason in reasons)
                    self._change(path, is_other)

    def _change(self, path: str, is_certain: bool) -> None:
        """Take an output for another one; of what `pick` lists, only what is in the list counts."""
        name = Path(path).relative_to(self.repo.root_dir)
        if name.parent == PICKED and name.stem in ("data", "scorers"):
            is_certain = is_certain and self.known[path] is not None
        if name == PICKED / "merged.json" and self.known[path] is None:
            merged = {stage for name in self.settings.merge.weights for stage in self.settings.lineage(name)}
            inside = [
                self.changed.get(str(Path(self.repo.root_dir, CHECKPOINTS, stage))) for stage in merged | {"base"}
            ]
            if all(each is None for each in inside) and str(Path(self.repo.root_dir, CHECKPOINTS)) not in self.newer:
                return
            is_certain = any(inside)
        self.changed[path] = is_certain

    def _reasons_above(self, stage: Any) -> Iterator[Reason]:
        """Inputs that will be others."""
        makers: dict[str, bool] = {}
        for path, is_certain in self.changed.items():
            if any(_overlap(path, dep.fs_path) for dep in stage.deps):
                makers[self.makers[path]] = makers.get(self.makers[path], False) or is_certain
        for maker, is_certain in makers.items():
            yield Reason(f"after {maker}", is_certain, is_certain)

    def _own_reasons(self, stage: Any) -> Iterator[Reason]:
        """What of the stage's own changed since it ran last."""
        if not any(out.hash_info for out in stage.outs):
            yield Reason("never ran", True)
            return
        if stage.cmd_changed:
            yield Reason("its command", True)
        for dep in stage.deps:
            if hasattr(dep, "params"):
                yield from _changed_params(dep)
            elif self.is_made(dep.fs_path):
                yield from self._made_anew(dep)
            elif dep.status():
                yield Reason(str(dep), False)
        for out in stage.outs:
            if status := out.status().get(str(out)):
                yield Reason(f"{out} is {status}", False)

    def _made_anew(self, dep: Any) -> Iterator[Reason]:
        """What was made since the stage ran last, by a run that did not come as far as the stage."""
        if not any(_overlap(path, dep.fs_path) for path in self.changed):
            now = self._hash(dep)
            if now and now != dep.hash_info:
                self.newer.add(dep.fs_path)
                yield Reason(f"{dep} is newer", True)

    def _look_up(self, stage: Any) -> dict[str, Any] | None:
        """What the run cache has for the inputs that the stage will have: hashes by path."""
        from dvc_data.hashfile.meta import Meta

        stage = copy.copy(stage)
        stage.deps = [copy.copy(dep) for dep in stage.deps]
        for dep in stage.deps:
            dep.hash_info, dep.meta = self._hash(dep), Meta()  # the run cache goes by hashes, and Meta may have one too
            dep.get_hash = partial(getattr, dep, "hash_info")  # and not that of a file, which may not be there yet
            if not dep.hash_info:
                return None
        entry = self.repo.stage_cache._load(stage)
        made = self.repo.stage_cache._create_stage(entry) if entry else None
        return {out.fs_path: out.hash_info for out in made.outs} if made and made.outs_cached() else None

    def _hash(self, dep: Any) -> Any:
        """What an input will hash to; None where that is not known, or nothing is there."""
        if dep.fs_path in self.known:
            return self.known[dep.fs_path]
        inside = [path for path in self.known if _overlap(path, dep.fs_path)]
        if not inside:
            return dep.get_hash() if dep.exists else None
        from dvc_data.hashfile.tree import Tree

        folder = Tree()
        if dep.exists:
            ignored = {"ignore": dep.dvcignore, "dry_run": True, "no_progress_bar": True}
            _, _, now = dep._build(dep.local_cache, dep.fs_path, dep.fs, dep.hash_name, **ignored)
            for key, meta, found in now:
                if not any(_overlap(path, str(Path(dep.fs_path, *key))) for path in inside):
                    folder.add(key, meta, found)
        for path in inside:
            found, key = self.known[path], Path(path).relative_to(dep.fs_path).parts
            if not found:
                return None
            for below, meta, each in Tree.load(dep.local_cache, found) if found.isdir else [((), None, found)]:
                folder.add(key + below, meta, each)
        folder.digest()
        return folder.hash_info

    def _seconds(self, stage: Any) -> float | None:
        """Of its last run, else of the mean of its kind's."""
        kind = stage.addressing.partition("@")[0]
        alike = {name: found for name, found in self.times.items() if name.partition("@")[0] == kind}
        work = self._work(stage.addressing, {})
        if stage.addressing in alike:
            return alike[stage.addressing] * work / self.worked[stage.addressing]
        rates = [found / self.worked.get(name, 1) for name, found in alike.items()]
        return work * sum(rates) / len(rates) if rates else None

    def _work(self, addressing: str, before: dict[str, Any]) -> float:
        """Examples that a training stage goes through, by its settings or those of `before`; 1 for all other stages."""
        kind, _, name = addressing.partition("@")
        stage = self.settings.stages.get(name)
        if kind != "train" or not isinstance(stage, Training):
            return 1
        return before.get("steps", stage.steps) * before.get("batch_size", stage.batch_size)


def _settings_before(stage: Any) -> dict[str, Any]:
    """What the lock file has of `stages.NAME`."""
    values = {
        key: value for dep in stage.deps if hasattr(dep, "params") for key, value in (dep.hash_info.value or {}).items()
    }
    return values.get(f"stages.{stage.addressing.partition('@')[2]}", {})


def _changed_params(dep: Any) -> Iterator[Reason]:
    """Each key that has another value than in the lock file, and both values."""
    before, now = dep.hash_info.value or {}, dep.read_params()
    for key in dep.params:
        for text in differences(key, before.get(key), now.get(key)):
            changed = text.partition(" ")[0].split(".")
            changes = str(dep) == str(PARAMS) and not FORGIVING & {changed[0], changed[-1]}
            yield Reason(text, changes)


def differences(key: str, before: Any, now: Any) -> Iterator[str]:
    """Each key below `key` that has another value now, with both values."""
    if before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*before, *(name for name in now if name not in before)]:
            yield from differences(f"{key}.{name}" if key else name, before.get(name), now.get(name))
    elif isinstance(before, list) and isinstance(now, list):
        gone, come = ([each for each in some if each not in others] for some, others in ((before, now), (now, before)))
        yield f"{key.rpartition('.')[2]}: {_value(gone)} → {_value(come)}"
    else:
        yield f"{key} {_value(before)} → {_value(now)}"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{key} {each}" for key, each in value.items()]
    text = "none" if value is None else ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
    return text if len(text) < WIDTH else f"{text[: WIDTH - 1]}…"


def _overlap(one: str, other: str) -> bool:
    """Whether two paths are one, or one lies in the other."""
    one, other = one.rstrip("/") + "/", other.rstrip("/") + "/"
    return one.startswith(other) or other.startswith(one)


def read_times() -> dict[str, float]:
    """Seconds that each stage took when it ran last here, by stage; see `stages.errors.note_time`."""
    try:
        lines = TIMES.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {found["stage"]: found["seconds"] for found in map(json.loads, lines)}
