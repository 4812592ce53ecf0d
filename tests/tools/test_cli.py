"""Every command of `strata`, whatever has run before it: what is missing is one sentence."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages import base, data
from tests.conftest import ROOT
from tools import cli

MISSING = {  # by command: what an empty folder, a fresh clone and one where the base and the data are ready lack
    "check": ("params.yaml is missing", None, None),
    "show sums": ("params.yaml is missing", "checkpoints/base is missing", None),
    "show sum": ("params.yaml is missing", "datasets has no 'sum'", "datasets has no 'sum'"),
    "view": ("reports/report.html is missing",) * 3,
    "compare checkpoints/base merged": (
        *("checkpoints/base is no model with config.json",) * 2,
        "merged holds no model.safetensors, no index and no adapter_config.json",
    ),
    "verify merged --base checkpoints/base --adapter checkpoints/sums": (
        "merged is not there; name a .safetensors file, or the folder of a model",
    )
    * 3,
    "answers sums": ("params.yaml is missing", *("reports/answers.parquet is missing",) * 2),
    "gate": ("params.yaml is missing", *("reports/evaluation.json is missing; run `dvc repro`",) * 2),
    "search": (
        "params.yaml is missing",
        "checkpoints/base holds no .safetensors file; run `dvc repro`",
        "checkpoints/sums holds no trained stage; run `dvc repro train@sums`",
    ),
    "export model": ("params.yaml is missing", *("merged/lineage.json is missing; run `dvc repro`",) * 2),
    "export gguf": ("params.yaml is missing", *("merged/lineage.json is missing; run `dvc repro`",) * 2),
    "export lora": (
        "params.yaml is missing",
        "checkpoints/base holds no .safetensors file; run `dvc repro`",
        "checkpoints/sums holds no trained stage; run `dvc repro train@sums`",
    ),
    "export hub me/tiny": ("export/model holds no model with its card; run `strata export model`",) * 3,
    "provenance merged/model.safetensors": ("merged/model.safetensors is no safetensors file",) * 3,
    "plan": ("params.yaml is missing", "dvc cannot say what would run", "dvc cannot say what would run"),
    "run": ("params.yaml is missing", "dvc cannot say what would run", "dvc cannot say what would run"),
    "experiments": ("dvc cannot list experiments",) * 3,
    "watch": ("params.yaml is missing", *("no curve of any stage is there",) * 2),
    "chat": (
        "params.yaml is missing",
        "checkpoints/base holds no .safetensors file; run `dvc repro`",
        "merged holds no merged model",
    ),
    "serve --port 70000": (
        "params.yaml is missing",
        "checkpoints/base holds no .safetensors file",
        "port 70000 of 127.0.0.1 cannot be had",
    ),
    "docs": ("docs/methods.md is missing",) * 3,  # of the three a clone alone has them
    "--print-completion ksh": ("--print-completion knows no shell 'ksh'; take bash, zsh",) * 3,
    "serach": ("strata has no command 'serach'; did you mean search?",) * 3,
}


def prepare(state):
    """Of the project in this folder what there is in a state."""
    if state == 0:
        for path in Path().iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if state == 2:
        base.main()
        data.main("sums")
        data.main("words")


@pytest.mark.parametrize("state", [0, 1, 2], ids=["empty folder", "nothing run", "half way"])
def test_what_is_missing_is_one_sentence(project, monkeypatch, state):
    text = Path("params.yaml").read_text().replace("    eval: 10", "    eval: 10\n    tune: 5")
    Path("params.yaml").write_text(text)
    prepare(state)
    for command, sentences in MISSING.items():
        monkeypatch.setattr(sys, "argv", ["strata", *command.split()])
        before = sorted(Path().rglob("*"))
        if sentences[state] is None:
            cli.main()
        else:
            with pytest.raises(SystemExit) as end:
                cli.main()
            told = str(end.value)
            assert told.startswith("error: ") and sentences[state] in told and "\n" not in told, command
        assert sorted(Path().rglob("*")) == before, command


def test_every_command_is_tried():
    assert {command.split()[0] for command in MISSING} == {*cli.COMMANDS, "--print-completion", "serach"}


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("pl", {"plan"}),
        ("s", {"show", "serve", "search"}),
        ("plan --j", {"--json"}),
        ("compare --output par", {"params.yaml"}),
    ],
)
def test_bash_completes_commands_options_and_files(project, monkeypatch, capsys, line, completed):
    monkeypatch.setattr(sys, "argv", ["strata", "--print-completion", "bash"])
    cli.main()
    words = ["strata", *line.split()]
    ask = f"""
        COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}
        $(complete -p strata | sed 's/.*-F \\([^ ]*\\).*/\\1/'); printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    script = capsys.readouterr().out + ask
    told = subprocess.run(["bash", "--norc"], input=script, capture_output=True, text=True, check=True).stdout
    assert set(told.split()) == completed


def test_who_reads_the_first_lines_alone_gets_no_traceback():
    words = [sys.executable, "-m", "tools.cli", "--print-completion", "bash"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
