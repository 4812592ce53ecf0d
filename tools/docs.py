"""Write what docs/ tells of the code: `strata docs`.

docs/params.md and docs/params.schema.json are made as a whole, parts of docs/methods.md, docs/import.md and
docs/merging.md between two marks.
"""

import json
import re
import warnings
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

from stages.errors import MistakeError, run
from stages.files import write_text
from tools.pages.importing import peft_keys
from tools.pages.merging import merge_table
from tools.pages.methods import methods_table, peft_types
from tools.pages.params import params_page
from tools.pages.schema import schema

DOCS = Path("docs")


def add_arguments(_: ArgumentParser) -> None:
    """Nothing to say."""


def main() -> None:
    """Write everything anew.

    Raises:
        MistakeError: the pages are not there, or have lost their marks.
    """
    if missing := [name for name, page in PAGES.items() if not callable(page) and not (DOCS / name).exists()]:
        raise MistakeError(f"{DOCS / missing[0]} is missing; run the command in the folder of the repository")
    warnings.simplefilter("ignore")  # peft and transformers have much to say about tiny models
    for name in PAGES:
        write_text(DOCS / name, made(DOCS / name))
        print(DOCS / name)


def made(path: Path) -> str:
    """A file of docs/ as it should be; what is not made from the code is as it is."""
    page = PAGES[path.name]
    if callable(page):
        return page()
    text = path.read_text(encoding="utf-8")
    for part, make in page.items():
        text = fill(text, part, make(), str(path))
    return text


def fill(text: str, part: str, content: str, where: str) -> str:
    """A page with what stands between the marks of a part replaced.

    Raises:
        MistakeError: the marks are not there.
    """
    start, end = f"<!-- {part}: made by strata docs -->", "<!-- end -->"
    found = re.search(f"(?<={re.escape(start)}\n).*?(?={end})", text, re.DOTALL)
    if not found:
        raise MistakeError(f"{where} has lost its marks {start} and {end}; put them back")
    return f"{text[: found.start()]}\n{content}\n\n{text[found.end() :]}"


# What is made as a whole, or the parts that are made by name.
PAGES: dict[str, Callable[[], str] | dict[str, Callable[[], str]]] = {
    "params.md": params_page,
    "params.schema.json": lambda: json.dumps(schema(), indent=1, ensure_ascii=False) + "\n",
    "methods.md": {"table of methods": methods_table, "types of PEFT": peft_types},
    "import.md": {"keys of PEFT": peft_keys},
    "merging.md": {"table of merge methods": merge_table},
}


if __name__ == "__main__":
    run(main)
