"""What is known of the base from its own files: its licence and languages, and where the hub has it."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.errors import MistakeError
from stages.models.source import locate
from stages.settings.base import Base

HUB = {"bundled:smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
LICENCE_KEYS = ("license", "license_name", "license_link")
EXACT = ("ALL_F32", "MOSTLY_F16", "MOSTLY_BF16")  # types of .gguf files that quantise nothing
OTHER = {"license": "other", "license_name": "license-of-the-base"}  # as the hub has what is in none of its lists


@dataclass(frozen=True)
class Origin:
    """What a base says of itself.

    Attributes:
        id: on the hub; None of a folder or file.
        licence: keys of a card's metadata, empty where nothing tells.
        languages: as the hub writes them, such as `en`; empty where nothing tells.
        quantised: of a .gguf file, how its weights were rounded before the training; None where they were not.
        licence_file: a file with the licence's text beside the weights.
    """

    id: str | None = None
    licence: dict[str, str] = field(default_factory=dict)
    languages: list[str] = field(default_factory=list)
    quantised: str | None = None
    licence_file: Path | None = None


def origin(base: Base) -> Origin:
    """What the base's card, licence file or .gguf metadata tell; what nothing tells is left empty."""
    source: dict[str, Any] = {}
    with suppress(MistakeError):  # it may be gone since, and what was made of it is here
        source = locate(base.model_copy(update={"sha256": None}))  # whose check reads every byte
    name = source.get("pretrained_model_name_or_path", base.model)
    if "gguf_file" in source:
        return _of_gguf(Path(name, source["gguf_file"]), HUB.get(base.model))
    if Path(name).is_dir():
        card, texts = Path(name, "README.md"), sorted(Path(name).glob("LICENSE*"))
        found = _of_card(card if card.is_file() else None, None)
        if found.licence or not texts:
            return found
        return Origin(None, OTHER | {"license_link": texts[0].name}, found.languages, licence_file=texts[0])
    return _of_card(_download(name, base.revision), name) if source else Origin()


def _of_card(path: Path | None, name: str | None) -> Origin:
    """A README.md with the hub's metadata."""
    from huggingface_hub import metadata_load

    told: dict[str, Any] = {}
    with suppress(Exception):  # people write what they like there
        told = (metadata_load(path) if path else None) or {}
    languages = told.get("language") or []
    licence = {key: str(told[key]) for key in LICENCE_KEYS if told.get(key)}
    return Origin(name, licence, [languages] if isinstance(languages, str) else list(languages))


def _of_gguf(path: Path, name: str | None) -> Origin:
    from gguf import GGUFReader, LlamaFileType

    fields = GGUFReader(path).fields

    def told(key: str) -> Any:
        return fields[f"general.{key}"].contents() if f"general.{key}" in fields else None

    kind = told("file_type")
    kind = None if kind is None else LlamaFileType(kind).name
    quantised = None if kind is None or kind in EXACT else kind.removeprefix("MOSTLY_")
    licence = {key: told(key.replace("_", ".")) for key in LICENCE_KEYS if told(key.replace("_", "."))}
    return Origin(name, licence, told("languages") or [], quantised)


def _download(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "README.md", revision=revision))
    except Exception:  # without a network, or without a card, nothing tells
        return None
