"""What every section of params.yaml has in common."""

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def nearest(name: object, known: Iterable[str], otherwise: str = "choose one of") -> str:
    """The end of a sentence about a name that is not known: the nearest one that is, or all of them."""
    listed = sorted(known)
    if close := difflib.get_close_matches(str(name), listed, n=1):
        return f"did you mean {close[0]}?"
    return f"{otherwise} {', '.join(listed)}" if listed else "remove it"


def mistake(text: str) -> PydanticCustomError:
    """A mistake that is told as `KEY text`, where KEY is where it stands in params.yaml."""
    return PydanticCustomError("mistake", "{text}", {"text": text})


class Settings(BaseModel):
    """A mapping of params.yaml: every key known, every value of the stated type.

    The text below a field says what it means; docs/params.md and the schema are made from it.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, content: Any) -> Any:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        if isinstance(content, dict):
            for key in content:
                if key not in known:
                    raise mistake(f".{key} is not a known key; {nearest(key, known, 'known keys are')}")
        return content


class Chosen(Settings):
    """A mapping that is of one of several classes, as the value of one of its keys says."""

    chooser: ClassVar[str]  # that key, such as `method`

    @classmethod
    def name(cls) -> str:
        """The value that selects this class."""
        return str(get_args(cls.model_fields[cls.chooser].annotation)[0])

    @classmethod
    def choices(cls) -> Iterator[type[Self]]:
        """Every class below this one that a value selects."""
        for subclass in cls.__subclasses__():
            if subclass.model_fields[cls.chooser].annotation is not str:
                yield subclass
            yield from subclass.choices()


def _check_name(name: str) -> str:
    if not PLAIN.fullmatch(name):
        raise mistake(" is no usable name; start with a letter and use only letters, digits, - and _")
    return name


Name = Annotated[str, AfterValidator(_check_name)]
