"""A clone with a cache of its own pulls what another pushed, and nothing is left to run."""

import subprocess
from pathlib import Path

import dvc.cli
import pytest

from tests.forked import Pipeline, commit, write_branched
from tools.plan import plan, told

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]


@pytest.fixture
def folder(tmp_path_factory):
    """A remote that is a folder, as the options that `dvc remote` has for it."""
    return {"url": str(tmp_path_factory.mktemp("storage"))}


@pytest.fixture
def s3(monkeypatch):
    """One in a bucket of a server on this machine."""
    pytest.importorskip("dvc_s3", reason="needs the extra s3")
    server = pytest.importorskip("moto.server", reason="needs the group remote")
    import boto3

    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "testing")
    running = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    endpoint = "http://{}:{}".format(*running.get_host_and_port())
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="bucket")
    yield {"url": "s3://bucket/strata", "endpointurl": endpoint}
    running.stop()


def call(*words):
    assert dvc.cli.main([*words]) == 0, words


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_another_clone_runs_nothing(project, monkeypatch, request, tmp_path_factory, kind):
    write_branched(project)
    pipeline = Pipeline(monkeypatch)
    assert pipeline.repro()
    remote = request.getfixturevalue(kind)  # once everything has run: its server is a thread, and stages are forks
    call("remote", "add", "-d", "storage", remote.pop("url"))
    for option, value in remote.items():
        call("remote", "modify", "storage", option, value)
    commit(project)
    call("push")

    clone = tmp_path_factory.mktemp("elsewhere") / "clone"
    subprocess.run(["git", "clone", "-q", str(project), str(clone)], check=True)
    monkeypatch.chdir(clone)
    assert not Path(".dvc/cache").exists() and not Path("merged").exists()
    call("pull")
    steps, total = plan()
    assert told(steps, total) == f"All {total} stages are up to date: nothing will run."
    assert pipeline.repro() == set()
    weights = Path("merged/model.safetensors")
    assert weights.read_bytes() == (project / weights).read_bytes()


def test_what_another_clone_tried_comes_from_its_runs(project, monkeypatch, folder, tmp_path_factory):
    """Every stage that is in the run cache can be had: none of its outputs is in git alone."""
    write_branched(project)
    pipeline = Pipeline(monkeypatch)
    pipeline.repro()
    call("remote", "add", "-d", "storage", folder["url"])
    commit(project)
    call("push")
    edit = Path("params.yaml").read_text().replace("lr: 1.0e-3", "lr: 2.0e-3")  # of side
    Path("params.yaml").write_text(edit)
    assert "train@side" in pipeline.repro()
    call("push", "--run-cache")

    clone = tmp_path_factory.mktemp("elsewhere") / "clone"
    subprocess.run(["git", "clone", "-q", str(project), str(clone)], check=True)
    monkeypatch.chdir(clone)
    call("pull", "--run-cache")
    Path("params.yaml").write_text(edit)
    pipeline.ran.clear()
    call("repro", "--pull")
    assert pipeline.ran == {"report"}  # whose pages git has
