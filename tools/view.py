"""Look at the report: `strata view` prints its headline and opens it in the browser."""

import webbrowser
from argparse import ArgumentParser

from stages.errors import MistakeError
from stages.files import REPORTS


def add_arguments(_: ArgumentParser) -> None:
    """Nothing to say."""


def main() -> None:
    """Print the headline; open the page, or say where it is.

    Raises:
        MistakeError: there is no report yet.
    """
    page, text = REPORTS / "report.html", REPORTS / "report.md"
    if not page.exists() or not text.exists():
        raise MistakeError(f"{page} is missing; run `dvc repro`")
    sentences = [line for line in text.read_text(encoding="utf-8").splitlines() if line.startswith("- ")]
    print("\n".join(sentences))
    if not webbrowser.open(page.resolve().as_uri()):
        print(f"\nNo browser was found; open {page}")
