"""The notebooks run from top to bottom, and what they show is of their own cells and of the default's results."""

import re
import shutil
import signal
import time
from pathlib import Path
from threading import Thread

import psutil
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from stages.errors import MistakeError
from stages.files import BASE
from stages.project import edit
from tests.conftest import ARCHITECTURES, COMMON, PARAMS, ROOT, make_base
from tests.forked import copy_repository

nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
from notebooks import make  # noqa: E402

COMMAND = re.compile(r"(?:(?<=`)|^)((?:pip|uv|git|-S)\b[^`\n]*)", re.MULTILINE)
CHAT = "{% for message in messages %}{{ message.role[0] }}: {{ message.content }}\n{% endfor %}"


@pytest.fixture
def default(workspace, monkeypatch):
    """The default's params.yaml, but for its size, on a tiny model of as many layers."""
    sizes = COMMON | {"num_hidden_layers": 30, "tie_word_embeddings": False}
    monkeypatch.setitem(ARCHITECTURES, "thirty layers", lambda: LlamaForCausalLM(LlamaConfig(**sizes)))
    make_base("thirty layers")
    shutil.move(BASE, "model")
    Path("model/stage.json").unlink()
    Path("model/chat_template.jinja").write_text(CHAT)
    shutil.copytree(ROOT / "guards", "guards")
    content = edit.yaml.load(ROOT / "params.yaml")
    content["base"]["model"], content["threads"], content["evaluate"]["max_new_tokens"] = "model", 1, 2
    for dataset in content["datasets"].values():
        dataset |= {"train": min(dataset["train"], 20), "eval": 3}
    for stage in content["stages"].values():
        stage |= {"steps": 4, "batch_size": 2}
    edit.yaml.dump(content, Path("params.yaml"))
    copy_repository(workspace)
    return workspace


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(default):
    before = Path("params.yaml").read_text()
    notebook = make.made("en")
    cells = make.code(notebook)
    assert len(cells) <= 12
    cells[2].source = cells[2].source.replace("= 80", "= 4")
    cells[10].source = cells[10].source.replace('"linear", ', "").replace('("ties")', '["ties"]')
    make.execute(notebook)
    said = ["".join(out.text if "text" in out else out.data["text/plain"] for out in cell.outputs) for cell in cells]
    pictures = [sum("image/svg+xml" in out.get("data", {}) for out in cell.outputs) for cell in cells]
    assert pictures == [0, 0, 0, 0, 1, 1, 1, 0, 0, 5, 2, 0]
    assert "params.yaml stays as it is" in said[2]
    assert said[3].startswith("Will run, 25 of 25")
    assert "| 4 of 4" in said[4] and "25 of 25 stages done in" in said[4]
    assert all(name in said[7] for name in ("base", "arithmetic", "siblings", "reversal", "merged"))
    assert "+     layers: 24-29" in said[8] and "Will run, 11 of 25:" in said[8]
    assert "layers 18-29 → 24-29" in said[8]
    assert "train@reversal │ done in" in said[9] and "steps of reversal" in said[9]
    kinds = [out.output_type for out in cells[10].outputs]
    assert kinds == ["stream", "display_data", "display_data", "stream", "display_data", "stream", "display_data"]
    assert "steps of" not in said[10]  # the training of before came from the cache
    assert Path("params.yaml").read_text() == before
    assert notebook.metadata.results == make.results()
    assert not any(out.get("name") == "stderr" for cell in cells for out in cell.outputs)


@pytest.mark.slow
def test_interrupted_it_stops_what_it_started_and_says_so(project):
    Path("params.yaml").write_text(PARAMS.replace("steps: 25", "steps: 5000"))
    copy_repository(project)
    cell = nbformat.v4.new_code_cell("from tools.notebook import run\nrun()")
    client = nbclient.NotebookClient(nbformat.v4.new_notebook(cells=[cell]), allow_errors=True)
    started: list[psutil.Process] = []

    def interrupt():
        while not Path("reports/train/sums.curve.json").exists():
            time.sleep(0.1)
        time.sleep(3)
        kernel = psutil.Process(client.km.provisioner.pid)
        started.extend(kernel.children(recursive=True))
        kernel.send_signal(signal.SIGINT)

    client.on_cell_execute = lambda **_: Thread(target=interrupt).start()
    client.execute()
    assert cell.outputs[-1].traceback == ["error: stopped; run() goes on from where it was"]
    assert "of 5000" in cell.outputs[0].data["text/plain"] and list(Path(".dvc/tmp/resume").iterdir())
    assert len(started) > 1 and not any(process.is_running() for process in started)


@pytest.mark.parametrize("language", make.NOTEBOOKS)
def test_what_is_committed_is_of_this_source_and_these_results(language):
    notebook = nbformat.read(make.NOTEBOOKS[language], 4)
    source = make.made(language)
    same = [cell.source for cell in notebook.cells] == [cell.source for cell in source.cells]
    assert same, "notebooks/pipeline.md is newer; run python -m notebooks.make"
    assert notebook.metadata.get("results") == make.results(ROOT), (
        "its outputs are of other results than dvc.lock's; run python -m notebooks.make --run in a fresh clone"
    )


def test_a_change_leaves_all_else_as_it_is(project, capsys):
    text = PARAMS.replace("    rank: 4\n", "    rank: 4  # of each matrix\n")
    Path("params.yaml").write_text(text)
    table = edit.stages()
    edit.write(table)
    assert capsys.readouterr().out == "params.yaml stays as it is\n"
    table.loc["sums", "rank"] = 8
    table.loc["words", "replay"] = ""
    edit.write(table)
    edit.change("merge.method", "ties")
    edited = text.replace("rank: 4 ", "rank: 8 ").replace("    replay: 0.25\n", "").replace("task_arithmetic", "ties")
    assert Path("params.yaml").read_text() == edited
    assert "+     rank: 8  # of each matrix" in capsys.readouterr().out


@pytest.mark.parametrize(("key", "value"), [("merge.metod", "ties"), ("stages.sums.lr", "much"), ("no.such.key", 1)])
def test_a_mistake_is_told_and_not_written(project, key, value):
    before = Path("params.yaml").read_text()
    with pytest.raises(MistakeError, match=r"params\.yaml: ") as mistake:
        edit.change(key, value)
    assert Path("params.yaml").read_text() == before
    assert mistake.value._render_traceback_() == [f"error: {mistake.value}"]


def test_the_russian_readme_names_the_same_commands():
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ru.md")]
    english, russian = ([line.partition("#")[0].strip() for line in COMMAND.findall(page)] for page in pages)
    assert len(english) > 12
    assert english == [line.replace(".ru.ipynb", ".ipynb") for line in russian]
