"""`strata export hub OWNER/NAME`: push export/model to the Hugging Face hub, privately if nothing else is said."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, metadata_load
from huggingface_hub.errors import RepositoryNotFoundError

from stages.errors import MistakeError, first_line
from stages.files import MERGED, read_json
from tools.exporting.card import FOLDER
from tools.terminal import size

AGAIN = "run `strata export model`"


def main(repo: str, public: bool, dry_run: bool) -> None:
    """Push every file in one commit; in what is printed for people to run, the model has its name on the hub.

    Raises:
        MistakeError: there is no exported model, it is another one than merged/, its card names no licence, the
            repository is public and --public was not said, or the hub refuses.
    """
    licence = read_licence()
    files = {path.relative_to(FOLDER).as_posix(): contents(path, repo) for path in listed()}
    if dry_run:
        for name, content in files.items():
            print(f"{size(len(content) if isinstance(content, bytes) else content.stat().st_size):>8}  {name}")
        print(f"to {repo}, {'public' if public else 'private'}, under {licence}; nothing was pushed")
        return
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    try:
        print(push(HfApi(), repo, operations, public))
    except MistakeError:
        raise
    except Exception as error:  # the hub's, and the network's
        raise MistakeError(
            f"the hub refuses {repo} ({first_line(error)}); log in with `hf auth login`, or correct the name"
        ) from None


def read_licence() -> str:
    """What the card of the exported model names, as it was written or edited since.

    Raises:
        MistakeError: see `main`.
    """
    if not (FOLDER / "README.md").exists():
        raise MistakeError(f"{FOLDER} holds no model with its card; {AGAIN}")
    if read_json(FOLDER / "lineage.json") != read_json(MERGED / "lineage.json"):
        raise MistakeError(f"{FOLDER} is of another merge than {MERGED}; {AGAIN}")
    licence = (metadata_load(FOLDER / "README.md") or {}).get("license")
    if not licence:
        raise MistakeError(
            f"{FOLDER / 'README.md'} names no licence, and without one nobody may use the model; find that of the base,"
            f" and {AGAIN} with --license ID"
        )
    return str(licence)


def listed() -> list[Path]:
    """Files to push: all but hidden ones, which notebooks and editors leave."""
    paths = sorted(path for path in FOLDER.rglob("*") if path.is_file())
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(FOLDER).parts)]


def contents(path: Path, repo: str) -> Path | bytes:
    """What is pushed of a file: itself, or a text in which the model has its name on the hub."""
    if path.name == "README.md":
        return path.read_text(encoding="utf-8").replace(f'model="{FOLDER}"', f'model="{repo}"').encode()
    if path.suffix == ".ipynb":
        notebook: dict[str, Any] = read_json(path)
        for cell in notebook["cells"]:
            cell["source"] = cell["source"].replace('model="."', f'model="{repo}"')
        return json.dumps(notebook, ensure_ascii=False, indent=1).encode()
    return path


def push(api: HfApi, repo: str, operations: list[CommitOperationAdd], public: bool) -> str:
    """Make the repository where it is not there, and commit; the address of the model."""
    try:
        found = api.model_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=not public)
    else:
        if not found.private and not public:
            raise MistakeError(f"{repo} is public on the hub; say --public, or choose another name")
    api.create_commit(repo, operations, commit_message="The model, its card and its lineage")
    return f"{api.endpoint}/{repo}"
