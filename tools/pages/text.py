"""Markdown."""

import inspect
import re


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A table, columns of numbers aligned to the right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    numeric = [all(cell.replace(",", "").isdigit() for cell in column) for column in zip(*rows, strict=True)]
    head, *rest = [f"| {' | '.join(row)} |" for row in [heads, *rows]]
    return "\n".join([head, "|" + "".join("--:|" if each else "---|" for each in numeric), *rest])


def paragraphs(thing: object) -> list[str]:
    """The docstring of a class or function, each paragraph in one line."""
    text = inspect.cleandoc(thing.__doc__ or "")
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def linked(text: str) -> str:
    """A text in which each `arXiv N` is a link."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
