"""Strata's merge beside what a user would run instead: `python benchmarks/merge.py --methods linear,ties`.

Every contender runs in a process of its own, one after the other, on the same base and the same three stages, and
a markdown table compares them; README.md tells what its columns mean.
"""

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from measuring import ROOT, ContenderError, Cost, Imports, measure, measure_imports

sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it; inherited by every contender

from mergekit.merge_methods import BasePolicy, MergeMethod, registered_methods
from subjects import MODELS, STAGES, make_stages, make_synthetic, write_params
from truth import SAMPLE, Error, accepts, errors

from stages.files import write_json
from stages.project.params import load_params

PARAMETERS: dict[str, dict[str, float]] = {  # mergekit's words; a method that is not named here takes its defaults
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "breadcrumbs": {"density": 0.5, "gamma": 0.01},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.01},
    "della": {"density": 0.5, "epsilon": 0.1},
    "della_linear": {"density": 0.5, "epsilon": 0.1},
    "sce": {"select_topk": 0.5},
    "slerp": {"t": 0.5},
    "nearswap": {"t": 0.0001},
}
IMPORTS = {
    "Strata": "import stages.merge",
    "mergekit": "import mergekit.scripts.run_yaml",
    "PEFT": "import torch; from peft import PeftModel; from transformers import AutoModelForCausalLM",
}
STRATA = """
import runpy, time
import stages.merge
start = time.perf_counter()
runpy.run_module("stages.merge", run_name="__main__", alter_sys=True)
print(f"\\nseconds {time.perf_counter() - start}")
"""  # is `python -m stages.merge`, with the time after the imports told
MERGE_AND_UNLOAD = f"""
import sys; {IMPORTS["PEFT"]}
threads, base, out, *adapters = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
for number, adapter in enumerate(adapters[1:], 1):
    model.load_adapter(adapter, adapter_name=str(number))
names = [str(number) for number in range(len(adapters))]
model.merge_and_unload(adapter_names=names).save_pretrained(out)
"""
COPY = """
import os, shutil, sys, time
start = time.perf_counter()
for source in sys.argv[2:]:
    target = shutil.copyfile(source, os.path.join(sys.argv[1], os.path.basename(source)))
    file = os.open(target, os.O_RDWR)
    os.fsync(file)
    os.close(file)
print(f"seconds {time.perf_counter() - start}")
"""


@dataclass
class Contest:
    """One model: the folder that all contenders share, and what has been measured in it."""

    folder: Path
    threads: int
    repeats: int
    mergekit_dtype: str
    imports: dict[str, Imports] = field(default_factory=dict)
    materialised: dict[str, Cost] = field(default_factory=dict)
    copying: float = 0.0
    stack: tuple[Cost, Error | None] | None = None
    rows: list["Row"] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def run(self, contender: str, command: list[str], out: Path) -> Cost | None:
        """Measure a contender that writes `out`: the fastest of the repeats, or None if it fails."""
        costs = []
        for _ in range(self.repeats):
            shutil.rmtree(out, ignore_errors=True)
            try:
                costs.append(measure(command, self.folder, self.imports[contender])[0])
            except ContenderError as error:
                self.failures.append(f"{contender}, {out.name}: {error}")
                return None
        written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        return replace(min(costs, key=lambda cost: cost.wall), written=written)

    def merge_and_unload(self, stages: list[str], out: Path) -> Cost | None:
        """Apply the adapters to a whole model with PEFT and save it."""
        folders = [str(self.folder / "checkpoints" / name) for name in ("base", *stages)]
        command = [sys.executable, "-c", MERGE_AND_UNLOAD, str(self.threads), folders[0], str(out), *folders[1:]]
        return self.run("PEFT", command, out)


@dataclass(frozen=True)
class Row:
    """One method: costs (None after a failure) and errors (None after a failure and where chance decides)."""

    method: str
    stages: int
    strata: Cost | None
    mergekit: Cost | None  # with the materialisation of its stages
    mergekit_alone: Cost | None
    strata_error: Error | None
    mergekit_error: Error | None


def prepare(contest: Contest, model: str) -> None:
    """Make the project, then measure what does not depend on the method."""
    folder, registry = contest.folder, {method.spec.name: method for method in registered_methods()}
    write_params(folder, "task_arithmetic", {}, list(STAGES))
    if MODELS[model] is None:
        measure([sys.executable, "-m", "stages.base"], folder)
    else:
        make_synthetic(folder, model)
    make_stages(folder)
    for contender, code in IMPORTS.items():
        measure_imports(code, folder)  # the first reads the libraries from the disk
        contest.imports[contender] = measure_imports(code, folder)
    contest.copying = copy_seconds(folder)
    out = folder / "stack"
    if cost := contest.merge_and_unload(list(STAGES), out):
        plain = [(out, False)]
        (error,) = errors(folder / "checkpoints", registry["task_arithmetic"], {"weight": 1.0}, list(STAGES), plain)
        contest.stack = cost, error
    shutil.rmtree(out, ignore_errors=True)
    for name in STAGES:
        if cost := contest.merge_and_unload([name], folder / "whole" / name):
            contest.materialised[name] = cost


def copy_seconds(folder: Path, repeats: int = 5) -> float:
    """Median seconds to copy the base's weights and have them on the disk, without the interpreter's start."""
    seconds, target = [], folder / "copy"
    sources = [str(path) for path in sorted((folder / "checkpoints/base").glob("*.safetensors"))]
    for _ in range(repeats):
        target.mkdir()
        seconds.append(measure([sys.executable, "-c", COPY, str(target), *sources], folder)[0].reported)
        shutil.rmtree(target)
    return statistics.median(seconds)


def compare(contest: Contest, method: MergeMethod) -> Row:
    """Merge with Strata and with mergekit, as many stages as the method takes, and compare both with the truth."""
    name, folder = method.spec.name, contest.folder
    stages = next(list(STAGES)[:count] for count in (3, 2, 1) if accepts(method, list(STAGES)[:count]))
    parameters = PARAMETERS.get(name, {})
    ours, theirs = folder / "merged", folder / f"mergekit-{name}"
    write_params(folder, name, parameters, stages)
    strata = contest.run("Strata", [sys.executable, "-c", STRATA], ours)
    write_mergekit_config(contest, method, stages)
    tool = str(Path(sys.executable).with_name("mergekit-yaml"))
    command = [tool, "mergekit.yaml", str(theirs), "-j", str(contest.threads), "--random-seed", "0", "--quiet"]
    alone = contest.run("mergekit", command, theirs)
    whole = alone
    for stage in stages:
        whole = whole and contest.materialised[stage].then(whole)
    outputs = [(out, out == ours) for out, cost in ((ours, strata), (theirs, alone)) if cost]
    weighted = parameters | ({"weight": 1.0} if takes_weight(method) else {})
    found = errors(folder / "checkpoints", method, weighted, stages, outputs)
    by_output = dict(zip([out for out, _ in outputs], found, strict=True))
    for out in (ours, theirs):
        shutil.rmtree(out, ignore_errors=True)
    return Row(name, len(stages), strata, whole, alone, by_output.get(ours), by_output.get(theirs))


def write_mergekit_config(contest: Contest, method: MergeMethod, stages: list[str]) -> None:
    """Write mergekit.yaml (JSON is YAML) on the materialised stages."""
    weight = {"parameters": {"weight": 1.0}} if takes_weight(method) else {}
    config = {
        "merge_method": method.spec.name,
        "models": [{"model": str(contest.folder / "whole" / name)} | weight for name in stages],
        "parameters": PARAMETERS.get(method.spec.name, {}),
        "dtype": contest.mergekit_dtype,
        "out_dtype": "bfloat16",
    }
    if method.spec.contract.base in (BasePolicy.REQUIRED, BasePolicy.OPTIONAL):
        config["base_model"] = str(contest.folder / "checkpoints/base")
    write_json(contest.folder / "mergekit.yaml", config)


def takes_weight(method: MergeMethod) -> bool:
    """Whether every stage has a weight in this method."""
    return "weight" in {parameter.name for parameter in method.spec.parameters}


def report(contest: Contest, model: str) -> str:
    """All that was measured, as markdown."""
    lines = [f"### Merging three stages into {model}", "", facts(contest), "", *steps(contest), ""]
    lines += [
        "Strata / mergekit with materialisation = ratio:",
        "",
        "| method | stages | wall s | CPU s | peak anonymous MB | peak total MB | written MB | mergekit-yaml alone s"
        " | × copy | × copy, no imports | error (floor) Strata | error (floor) mergekit |",
        "|---|" + "--:|" * 11,
        *(method_line(contest, row) for row in contest.rows),
        "",
        *(f"- failed: {failure}" for failure in contest.failures),
    ]
    return "\n".join(lines).rstrip() + "\n"


def facts(contest: Contest) -> str:
    """Machine, versions and settings in one line."""
    cpu = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0].strip("\t :")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{package} {version(package)}" for package in ("mergekit", "peft", "torch", "transformers"))
    return (
        f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, Python {platform.python_version()},"
        f" {versions}; {contest.threads} threads; mergekit computes in {contest.mergekit_dtype}, all files are"
        f" bfloat16; error over {SAMPLE} touched tensors; fastest of {contest.repeats} run(s)."
    )


def steps(contest: Contest) -> list[str]:
    """Table of what does not depend on the method."""
    header = "| step | wall s | CPU s | peak anonymous MB | peak total MB | written MB | error (floor) |"
    lines = [header, "|---|" + "--:|" * 6, f"| copy the base, fsync | {contest.copying:.2f} | – | – | – | – | – |"]
    for contender, imports in contest.imports.items():
        held = f"{imports.anonymous / 1e6:.0f} | {(imports.anonymous + imports.mapped) / 1e6:.0f}"
        lines.append(f"| imports alone: {contender} | {imports.wall:.1f} | {imports.cpu:.1f} | {held} | – | – |")
    costs: dict[str, tuple[Cost, Error | None]] = {
        f"PEFT, materialise {name}": (cost, None) for name, cost in contest.materialised.items()
    }
    if contest.stack:
        costs["PEFT, the three in one model"] = contest.stack
    for step, (cost, error) in costs.items():
        sizes = " | ".join(f"{value / 1e6:.0f}" for value in (cost.anonymous, cost.total, cost.written))
        lines.append(f"| {step} | {cost.wall:.1f} | {cost.cpu:.1f} | {sizes} | {error_cell(error)} |")
    return lines


def method_line(contest: Contest, row: Row) -> str:
    """One method's line of the table."""

    def pair(value: Callable[[Cost], float], digits: int) -> str:
        ours, theirs = (f"{value(cost):.{digits}f}" if cost else "failed" for cost in (row.strata, row.mergekit))
        if not row.strata or not row.mergekit or not value(row.mergekit):
            return f"{ours} / {theirs}"
        return f"{ours} / {theirs} = {value(row.strata) / value(row.mergekit):.2f}"

    alone = f"{row.mergekit_alone.wall:.1f}" if row.mergekit_alone else "failed"
    copies = ["–", "–"]
    if row.strata:
        copies = [f"{seconds / contest.copying:.1f}" for seconds in (row.strata.wall, row.strata.reported)]
    cells = [
        row.method,
        str(row.stages),
        pair(lambda cost: cost.wall, 1),
        pair(lambda cost: cost.cpu, 1),
        *(pair(value, 0) for value in (_anonymous, _total, _written)),
        alone,
        *copies,
        error_cell(row.strata_error),
        error_cell(row.mergekit_error),
    ]
    return f"| {' | '.join(cells)} |"


def _anonymous(cost: Cost) -> float:
    return cost.anonymous / 1e6


def _total(cost: Cost) -> float:
    return cost.total / 1e6


def _written(cost: Cost) -> float:
    return cost.written / 1e6


def error_cell(error: Error | None) -> str:
    """Error and rounding floor, or a dash where there is none."""
    return "–" if error is None else "{:.3f} ({:.3f})".format(*error.relative())


def parse() -> argparse.Namespace:
    """Command line; `methods` becomes mergekit's methods of those names, by default all of them."""
    registry = {method.spec.name: method for method in registered_methods()}
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=list(MODELS), default="smollm2")
    parser.add_argument("--methods", help="comma-separated; default: every method that mergekit registers")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each contender, of which the fastest counts")
    parser.add_argument("--mergekit-dtype", default="bfloat16", help="what mergekit computes in")
    parser.add_argument("--work", type=Path, help="where the temporary folder is made")
    parser.add_argument("--output", type=Path, help="also write the tables to this file, after each method")
    arguments = parser.parse_args()
    names = arguments.methods.split(",") if arguments.methods else sorted(registry)
    if unknown := [name for name in names if name not in registry]:
        parser.error(f"no method {', '.join(unknown)}; known are {', '.join(sorted(registry))}")
    arguments.methods = [registry[name] for name in names]
    return arguments


def main() -> None:
    """Run all contenders for one model and print the tables."""
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="strata-", dir=arguments.work) as folder:
        threads = load_params(ROOT / "params.yaml").thread_count
        contest = Contest(Path(folder).resolve(), threads, arguments.repeats, arguments.mergekit_dtype)
        prepare(contest, arguments.model)
        for method in arguments.methods:
            print(f"{method.spec.name} …", file=sys.stderr, flush=True)
            contest.rows.append(compare(contest, method))
            if arguments.output:
                arguments.output.write_text(report(contest, arguments.model), encoding="utf-8")
    print(report(contest, arguments.model))


if __name__ == "__main__":
    main()
