"""The table of docs/merging.md: what each merge method is, what it takes, and whether it keeps low rank."""

from mergekit.merge_methods import MergeMethod, registered_methods
from mergekit.merge_methods.base import ParameterScope, ParameterSpec

import stages.merging.methods  # noqa: F401  registers them beside mergekit's
from stages.merging.kernels import accepts
from stages.merging.method import OURS, traits_of
from tools.pages.text import paragraphs, table


def merge_table() -> str:
    """A row for each method, ours first."""
    methods = sorted(registered_methods(), key=lambda method: (method.spec.name not in OURS, method.spec.name))
    heads = ["method", "what it is", "stages", "weights", "parameters with defaults", "low rank"]
    return table(heads, [_row(method) for method in methods])


def _row(method: MergeMethod) -> list[str]:
    spec = method.spec
    parameters = [_parameter(each) for each in spec.parameters if each.name not in ("weight", "int8_mask")]
    weighted = any(each.name == "weight" for each in spec.parameters)
    return [
        f"`{spec.name}`",
        _about(method),
        _stages(method),
        "yes" if weighted else "–",
        ", ".join(parameters) or "–",
        _rank(spec.name),
    ]


def _about(method: MergeMethod) -> str:
    """mergekit's name of its method, or the first line of ours, with a link to the paper."""
    spec = method.spec
    text = paragraphs(method.implementation)[0].removesuffix(".") if spec.name in OURS else spec.pretty_name
    return f"[{text}]({spec.reference_url})" if spec.reference_url else text


def _stages(method: MergeMethod) -> str:
    """How many stages it takes."""
    counts = [count for count in range(1, 9) if accepts(method, [str(number) for number in range(count)])]
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} or more"


def _parameter(parameter: ParameterSpec) -> str:
    default = "" if parameter.required or parameter.default is None else f" {str(parameter.default).lower()}"
    return f"`{parameter.name}`{default}{'' if parameter.scope == ParameterScope.SHARED else ' each'}"


def _rank(name: str) -> str:
    """Whether low-rank stages give a low-rank merge."""
    traits = traits_of(name)
    return "kept" if traits.is_sum or traits.rotation_free else "with `space: core`"
