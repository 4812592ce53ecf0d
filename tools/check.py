"""Check params.yaml and say what it means here: `strata check`."""

from argparse import ArgumentParser

from stages.project.check import check_against_base, load_checked
from stages.project.params import PARAMS


def add_arguments(_: ArgumentParser) -> None:
    """Nothing to say."""


def main() -> None:
    """Tell the first mistake, or that there is none."""
    params = load_checked()
    check_against_base(params)
    print(f"{PARAMS}: {len(params.stages)} stages, {len(params.merge.weights)} of them merged; no mistakes")
    if params.threads == "auto":
        print(
            f"threads: auto is {params.thread_count} on this machine. A machine with another number gets other last"
            " digits, and DVC takes both for the same result; pin a number to share results bit for bit."
        )
