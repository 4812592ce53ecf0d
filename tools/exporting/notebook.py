"""The notebook beside an exported model: it loads and asks it in plain transformers, here or on Colab."""

from typing import Any

CHAT = """\
said = []


def chat(text):
    said.append({"role": "user", "content": text})
    said[:] = ask(said)[0]["generated_text"]
    print(said[-1]["content"])


chat("Hello! What can you do?")"""
CONTINUE = 'print(ask("Once upon a time")[0]["generated_text"])'


def make_notebook(told: dict[str, Any], code: str) -> dict[str, Any]:
    """The notebook as JSON, in format 4.5.

    Args:
        told: what the card tells, see `tools.exporting.card.tell`.
        code: lines that load the model and ask it.
    """
    heads = [" ", *told["skills"]]
    rows = [heads, ["---"] * len(heads), *([model, *cells] for model, cells in told["matrix"].items())]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    loading, asking = code.split("\nquestion", 1)
    is_chat = asking.endswith('["content"])')
    cells = [
        ("markdown", f"# {told['name']}\n\nRun the cells from top to bottom."),
        ("code", f'%pip install -q "transformers>={told["transformers"]}" torch'),
        ("code", loading),
        ("code", f"question{asking}"),
        ("markdown", f"## Every model on every skill\n\n{table}\n\n{told['legend']}"),
        ("markdown", "## Ask it yourself\n\nIt remembers what was said." if is_chat else "## Let it go on"),
        ("code", CHAT if is_chat else CONTINUE),
    ]
    return {
        "cells": [_cell(f"cell-{number}", *cell) for number, cell in enumerate(cells)],
        "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _cell(name: str, kind: str, text: str) -> dict[str, Any]:
    cell = {"id": name, "cell_type": kind, "metadata": {}, "source": text}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})
