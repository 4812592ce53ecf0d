"""Files that are whole or absent, and how a stage ends when the system refuses it something."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from stages import errors
from stages.errors import MistakeError
from stages.files import BASE, FORMAT, REPORTS, publish, read_json, read_record, write_json, write_text
from stages.methods import METHODS
from stages.models.architecture import Architecture
from stages.models.source import locate
from stages.records.scorers import choose
from stages.records.sources.file import LocalFile
from stages.settings.base import Base
from tests.conftest import ROOT


def test_an_error_leaves_what_stood_there_and_nothing_beside_it(workspace):
    write_text(Path("out/a"), "old")
    with publish(Path("out/folder")) as folder:
        write_text(folder / "b", "old")
    before = {path: path.read_text() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(UnicodeEncodeError):
        write_text(Path("out/a"), "\ud83d")
    with pytest.raises(ZeroDivisionError), publish(Path("out/folder")) as folder:
        write_text(folder / "b", "new")
        raise ZeroDivisionError
    assert {path: path.read_text() for path in Path().rglob("*") if path.is_file()} == before
    assert not list(Path().rglob("*.tmp"))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00", "9" * 5000])
def test_what_is_not_json_is_told(workspace, text):
    Path("a.json").write_text(text)
    with pytest.raises(MistakeError, match=r"^a.json is not valid JSON \(.*\); write it anew$"):
        read_json(Path("a.json"))


def test_what_is_missing_or_no_record_is_told(workspace):
    with pytest.raises(MistakeError, match=r"^a/stage.json is missing; run `dvc repro`$"):
        read_record(Path("a"))
    write_json(Path("checkpoints/a/stage.json"), [])
    with pytest.raises(MistakeError, match=r"^checkpoints/a/stage.json holds \[\] and no object; run `dvc repro`"):
        read_record(Path("checkpoints/a"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", r"is not valid JSON \(.*\); run `dvc repro`, which makes it again"),
        ("[]", r"holds \[\] and no object; run `dvc repro`, which makes it again"),
        ("{}", r"has no 'modules'; run `dvc repro`, which makes it again"),
        ('{"modules": {}}', r"has no 'model_type'; run `dvc repro`, which makes it again"),
        ('{"modules": {"a": {}}}', r"tells of no architecture \(.*\); run `dvc repro`, which makes it again"),
        ('{"modules": 3}', r"tells of no architecture \(.*\); run `dvc repro`, which makes it again"),
    ],
)
def test_an_output_that_is_not_what_its_stage_wrote_is_told(workspace, text, sentence):
    path = BASE / "architecture.json"
    write_text(path, text)
    with pytest.raises(MistakeError, match=f"^{path} {sentence}$"):
        Architecture.of(BASE)


def test_a_key_that_a_file_lacks_is_told_at_any_depth_and_is_a_key_error_still(workspace):
    write_json(REPORTS / "evaluation.json", {"a": [{"b": {}}]})
    content = read_json(REPORTS / "evaluation.json")
    assert content == {"a": [{"b": {}}]} and content.get("c", 1) == 1 and "c" not in content["a"][0]
    with pytest.raises(KeyError) as mistake:
        content["a"][0]["b"]["c"]
    assert isinstance(mistake.value, MistakeError)
    assert str(mistake.value) == "reports/evaluation.json has no 'c'; run `dvc repro`, which makes it again"


def test_a_checkpoint_of_another_format_is_refused(workspace):
    for content in ({"name": "a"}, {"name": "a", "format": FORMAT}):
        write_json(Path("a/stage.json"), content)
        assert read_record(Path("a")) == content
    for found in (FORMAT + 1, "2", None):
        write_json(Path("a/stage.json"), {"name": "a", "format": found})
        with pytest.raises(
            MistakeError, match=rf"^a has checkpoint format {found!r}, and this version of Strata reads 1"
        ):
            read_record(Path("a"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "a.json"),
        PermissionError(errno.EACCES, "Permission denied", "a.json"),
        RuntimeError("Error while serializing: I/O error: File too large (os error 27)"),  # as safetensors has it
    ],
)
def test_a_full_disk_and_a_read_only_file_are_one_sentence(error):
    def fail():
        raise error

    with pytest.raises(SystemExit, match=r"^error: a.* cannot be written \(.*\); give it room, and the right to"):
        errors.run(fail)


def test_any_other_error_of_the_system_is_ours():
    with pytest.raises(FileNotFoundError):
        errors.run(lambda: Path("nothing").read_text())


STAGE = "import time; from stages.errors import run; run(lambda: (print('in', flush=True), time.sleep(60)))"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {STAGE!r}])"


@pytest.mark.skipif(sys.platform != "linux", reason="the system knows no such signal")
def test_a_stage_ends_with_the_dvc_that_started_it(workspace):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DVC_STAGE": "sums"}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "in\n"
    (stage,) = psutil.Process(parent.pid).children()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    psutil.wait_procs([stage], timeout=10)
    assert not stage.is_running() or stage.status() == psutil.STATUS_ZOMBIE


def imports(path):
    METHODS["import"](parent="base", dataset="d", method="import", path=path, sha256="x").locate()


@pytest.mark.parametrize(
    ("path", "key", "read"),
    [
        ("rows.jsonl", "here.path", lambda path: LocalFile(source="file", path=path, eval=1).rows("", "here")),
        ("folder", "params.yaml: base.model", lambda path: locate(Base(model=path))),
        ("models/folder", "params.yaml: base.model", lambda path: locate(Base(model=path))),  # as a hub id looks
        ("model.gguf", "params.yaml: base.model", lambda path: locate(Base(model=path))),
        ("adapter", "path", imports),
        ("mine.py", "here.score", lambda path: choose("mine:half", None, [{"completion": "a"}], "here")),
    ],
)
def test_what_git_does_not_track_is_told_where_dvc_left_it_out(workspace, monkeypatch, path, key, read):
    (workspace / "main" / path).mkdir(parents=True)
    (workspace / "temporary").mkdir()
    monkeypatch.chdir(workspace / "temporary")
    for root, is_there in ((workspace / "main", True), (workspace / "temporary", False), (None, False)):
        if root:
            monkeypatch.setenv("DVC_ROOT", str(root))
        else:
            monkeypatch.delenv("DVC_ROOT")
        with pytest.raises(MistakeError) as mistake:
            read(path)
        sentence = (
            f"{key} {path!r} is not in the workspace of --temp or --queue, which has only what git tracks; git add"
        )
        assert str(mistake.value).startswith(sentence) == is_there, root


@pytest.mark.parametrize(
    ("key", "read"),
    [
        ("here.path", lambda path: LocalFile(source="file", path=path, eval=1).rows("", "here")),
        ("params.yaml: base.model", lambda path: locate(Base(model=path))),
        ("path", imports),
        ("here.score", lambda path: choose(f"{path}:half", None, [{"completion": "a"}], "here")),
    ],
)
def test_a_path_that_the_system_does_not_take_is_told(workspace, key, read):
    with pytest.raises(MistakeError, match=rf"^{key} cannot be looked up \(File name too long\); correct the path$"):
        read("x" * 300)
