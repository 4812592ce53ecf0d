"""Table of docs/import.md: what an imported adapter's configuration may say."""

import importlib.metadata

from peft import PEFT_TYPE_TO_CONFIG_MAPPING

from stages.weights.foreign import NO_EFFECT, REFUSED, TAKEN, TYPES
from tools.pages.text import table


def peft_keys() -> str:
    """The types of PEFT, then every key of those that are taken."""
    refused = sorted({kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - set(TYPES))
    types = (
        f"Of the types of PEFT {importlib.metadata.version('peft')}, {', '.join(sorted(TYPES))} are taken;"
        f" {', '.join(refused)} are refused."
    )
    rows = [[f"`{key}`", each.values, each.reason] for key, each in REFUSED.items()]
    lists = [
        f"Taken as PEFT takes them: {_listed(TAKEN)}.",
        f"Of no effect on the weights of an adapter that is trained: {_listed(NO_EFFECT)}.",
        "Refused where it says anything: every other key, such as one of a newer PEFT.",
    ]
    return "\n\n".join([types, table(["key", "refused with", "because"], rows), *lists])


def _listed(keys: list[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)
