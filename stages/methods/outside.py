"""An adapter that was trained elsewhere, taken as it is (`import`)."""

from __future__ import annotations

from typing import Literal

from stages.methods.stage import Stage


class Import(Stage):
    """A PEFT adapter of the base: a local folder with the hash that pins it, or a hub id with its revision."""

    method: Literal["import"]
    path: str | None = None
    sha256: str | None = None
    id: str | None = None
    revision: str | None = None
