"""Make both notebooks of pipeline.md, which has the prose in two languages and the code once.

`python -m notebooks.make` after an edit of the prose. `python -m notebooks.make --run`, in a fresh clone, after one of
the code, or when the default's results became others: it runs every cell, and prints how long each takes.
"""

import hashlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode, v4
from ruamel.yaml import YAML

SOURCE = Path(__file__).with_name("pipeline.md")
NOTEBOOKS = {"en": SOURCE.with_suffix(".ipynb"), "ru": SOURCE.with_suffix(".ru.ipynb")}
SHOWN = ("merged", "reports/answers.parquet", "reports/evaluation.svg", "reports/layers.svg")
PYTHON = {"display_name": "Python 3", "language": "python", "name": "python3"}


def main(run: bool) -> None:
    """Write both; where no cell's code changed, outputs stay as they are."""
    ran = execute(made("en")) if run else nbformat.read(NOTEBOOKS["en"], 4)
    for language, path in NOTEBOOKS.items():
        notebook = made(language)
        if [cell.source for cell in code(notebook)] == [cell.source for cell in code(ran)]:
            for cell, done in zip(code(notebook), code(ran), strict=True):
                cell.update(outputs=done.outputs, execution_count=done.execution_count)
            notebook.metadata.results = ran.metadata.get("results")
        nbformat.write(notebook, path)


def made(language: str) -> NotebookNode:
    """The notebook in a language, its cells without outputs."""
    parts = re.split(r"^<!-- (\w+) -->\n", SOURCE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    cells = []
    for number, (kind, text) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        if kind == "code":
            cells.append(v4.new_code_cell(text.strip().removeprefix("```python\n").removesuffix("\n```")))
        elif kind == language:
            cells.append(v4.new_markdown_cell(text.strip()))
        else:
            continue
        cells[-1].id = f"{kind}-{number}"
    return v4.new_notebook(cells=cells, metadata={"kernelspec": PYTHON})


def code(notebook: NotebookNode) -> list[NotebookNode]:
    """Its cells of code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(notebook: NotebookNode, folder: Path = Path()) -> NotebookNode:
    """Run all cells in a folder, and note whose results they show; a cell that fails raises nbclient's error."""
    begun = 0.0

    def begin(**_: object) -> None:
        nonlocal begun
        begun = time.monotonic()

    def tell(cell: NotebookNode, **_: object) -> None:
        print(f"{time.monotonic() - begun:7.1f} s  {cell.source.splitlines()[-1]}", flush=True)

    resources = {"metadata": {"path": str(folder)}}
    told: dict[str, Any] = {"on_cell_execute": begin, "on_cell_executed": tell}
    NotebookClient(notebook, record_timing=False, resources=resources, **told).execute()
    for cell in code(notebook):
        cell.outputs = joined(cell.outputs)
    notebook.metadata.results = results(folder)
    return notebook


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs with printed text that follows printed text put together; nbclient's own way would move it up."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if kept and output.output_type == "stream" and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def results(folder: Path = Path()) -> dict[str, str]:
    """What a notebook that ran in a folder shows, as hashes: the values of params.yaml, and outputs in dvc.lock.

    A section that is empty is as one that is not there.
    """
    read = YAML(typ="safe", pure=True).load
    sections = {name: values for name, values in read(folder / "params.yaml").items() if values != {}}
    values = json.dumps(sections, sort_keys=True)
    outs = [out for stage in read(folder / "dvc.lock")["stages"].values() for out in stage["outs"]]
    found = {out["path"]: out["md5"] for out in outs if out["path"] in SHOWN}
    return found | {"params.yaml": hashlib.md5(values.encode()).hexdigest()}


if __name__ == "__main__":
    main(run="--run" in sys.argv[1:])
