"""An adapter that was trained elsewhere, taken as it is (`import`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stages.errors import MistakeError, first_line, placed
from stages.files import ADAPTER, refuse_untracked, sha256
from stages.settings.stage import Imported, Stage

if TYPE_CHECKING:
    from stages.settings.base import Base


class Import(Imported):
    """A PEFT adapter of the base: a local folder with the hash that pins it, or a hub id with its revision."""

    method: Literal["import"]
    path: str | None = None
    """Folder of the adapter."""
    sha256: str | None = None
    """Hash of the folder's two files; leave it out, and the error tells it."""
    id: str | None = None
    """In place of `path`: an adapter on the hub, `owner/name`."""
    revision: str | None = None
    """The commit of a hub adapter."""

    def check(self, name: str, base: Base, stages: dict[str, Stage], num_layers: int | None) -> None:
        """It stands on the base, and comes from one place."""
        super().check(name, base, stages, num_layers)
        if (self.path is None) == (self.id is None):
            raise MistakeError("path or id is needed, one of them: a local folder, or an adapter on the hub")
        if self.id is not None and self.revision is None:
            raise MistakeError("revision is missing; a hub adapter needs the commit to be repeatable")

    def try_out(self) -> None:
        """A folder and its configuration are looked at; what is on the hub is left to the stage itself."""
        from stages.weights.foreign import read_config

        if self.path is not None:
            folder = self.locate()
            with placed("path: "):
                read_config(folder / ADAPTER[0])

    def try_on_base(self) -> None:
        """Each tensor of a folder has its place."""
        from stages.weights.foreign import AGAIN, names_in_peft, read_config
        from stages.weights.tensor_file import TensorFile

        if self.path is not None:
            config, weights = (self.locate() / file for file in ADAPTER)
            with placed("path: "):
                names_in_peft(TensorFile(weights, AGAIN), read_config(config))

    def locate(self) -> Path:
        """Folder with the adapter's two files, downloaded if it is on the hub."""
        if self.path is not None:
            refuse_untracked(Path(self.path), "path")
        folder = Path(str(self.path)) if self.id is None else self._download()
        if missing := [file for file in ADAPTER if not (folder / file).is_file()]:
            place = f"path {self.path!r}" if self.id is None else f"id {self.id!r}"
            raise MistakeError(f"{place} holds no {missing[0]}; {_fix(folder)}")
        if self.id is not None:
            return folder
        found = sha256(folder / file for file in ADAPTER)
        if self.sha256 is None:
            raise MistakeError(f"sha256 is missing; it pins what is merged, so add sha256: {found}")
        if self.sha256 != found:
            raise MistakeError(f"sha256 is not that of {self.path}; if it was meant to change, write {found}")
        return folder

    def _download(self) -> Path:
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(str(self.id), revision=self.revision, allow_patterns=list(ADAPTER)))
        except Exception as error:  # the library raises its own, the hub's, and the network's
            raise MistakeError(
                f"id {self.id!r} does not load ({first_line(error)}); correct the id or revision"
            ) from None


def _fix(folder: Path) -> str:
    """What to do with a folder that lacks one of an adapter's two files."""
    if (folder / "adapter_model.bin").exists():
        return "adapter_model.bin can hold code, so load it by PEFT and save it again, as safetensors"
    if list(folder.glob("adapters.*")):
        return "adapters.safetensors is MLX's, so convert it to a PEFT adapter"
    return "give the folder of a PEFT adapter"
