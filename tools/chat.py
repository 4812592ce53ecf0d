"""A chat with the base, stages and the merged model, one or several side by side: `strata chat base merged`.

Each answers in the base's own chat format, greedily, as it was scored, and has a conversation of its own.
"""

from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from transformers import PreTrainedModel, TextStreamer

from stages.errors import MistakeError
from stages.models.loading import load_tokenizer
from stages.models.scoring import STOP, UNASKED, generate
from stages.project.params import Params, load_params
from stages.records.record import Record
from stages.settings.section import nearest
from tools.models import load, names_of
from tools.terminal import positive, visible

HELP = "/swap NAME … talks to others, /reset forgets what was said, /quit ends"
CUT = "(cut by --max-new-tokens, or by how much the model reads)"
LONGER = "(longer than the model reads; /reset forgets what was said)"


def add_arguments(parser: ArgumentParser) -> None:
    """With whom, and what is asked."""
    parser.add_argument(
        "models", nargs="*", default=["merged"], help="base, stages, merged and routers; merged by default"
    )
    parser.add_argument("--questions", type=Path, help="a file with a question on each line, each asked anew")
    parser.add_argument("--max-new-tokens", type=positive, default=512, help="of an answer; 512")


def main(models: list[str], questions: Path | None, max_new_tokens: int) -> None:
    """Ask until the input ends.

    Raises:
        MistakeError: a model or the file of questions is not there.
    """
    settings = load_params()
    chat = Chat(settings, max_new_tokens)
    chat.swap(models)
    if questions:
        for line in _lines(questions):
            print(f"> {visible(line)}")
            chat.reset()
            chat.ask(line)
        return
    print(f"{', '.join(chat.names)}; {HELP}")
    with suppress(EOFError, KeyboardInterrupt):
        while (line := input("> ").strip()) != "/quit":
            _obey(chat, line)


def _obey(chat: "Chat", line: str) -> None:
    command, *words = line.split() or [""]
    try:
        match command:
            case "":
                pass
            case "/swap":
                chat.swap(words)
            case "/reset":
                chat.reset()
            case _ if command.startswith("/"):
                print(HELP)
            case _:
                chat.ask(line)
    except MistakeError as mistake:
        print(mistake)


def _lines(path: Path) -> Iterator[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MistakeError(f"--questions: {path} cannot be read ({error}); give a text file") from None
    return (line.strip() for line in lines if line.strip())


class Chat:
    """Models that are talked to.

    Attributes:
        names: of those that answer now.
        said: what each was asked and answered, as messages.
    """

    def __init__(self, settings: Params, max_new_tokens: int) -> None:
        self.settings, self.known = settings, names_of(settings)
        torch.set_num_threads(settings.thread_count)  # as in scoring
        self.bounds = settings.evaluate.model_copy(update={"max_new_tokens": max_new_tokens})
        self.tokenizer, self.loaded = load_tokenizer(), dict[str, PreTrainedModel]()
        self.names: list[str] = []
        self.said: dict[str, list[dict[str, str]]] = {}

    def swap(self, names: list[str]) -> None:
        """Talk to these from now on; each begins anew where it was not talked to.

        Raises:
            MistakeError: one of them is not known, or not trained yet.
        """
        if not names:
            raise MistakeError(f"name one or more of {', '.join(self.known)}")
        for name in names:
            if name not in self.known:
                raise MistakeError(f"there is no model {name!r}; {nearest(name, self.known)}")
            if name not in self.loaded:
                self.loaded[name] = load(self.settings, name)
        self.names = list(dict.fromkeys(names))

    def reset(self) -> None:
        """Forget what was said."""
        self.said.clear()

    def ask(self, text: str) -> None:
        """Print what each says, as it comes."""
        for name in self.names:
            if len(self.names) > 1:
                print(f"[{name}]")
            said = self.said.setdefault(name, [])
            record = self._record([*said, {"role": "user", "content": text}])
            streamer = _Visible(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
            (answer,) = generate(self.loaded[name], self.tokenizer, [record], self.bounds, streamer)
            if answer.end != STOP:
                print(LONGER if answer.end == UNASKED else CUT)
            said += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.text}]

    def _record(self, messages: list[dict[str, str]]) -> Record:
        """The conversation with an answer to come; plain text where the base has no chat format."""
        if self.tokenizer.chat_template is None:
            return {"prompt": "\n".join(message["content"] for message in messages), "completion": "?"}
        return {"messages": [*messages, {"role": "assistant", "content": "?"}]}


class _Visible(TextStreamer):
    """Prints text as it comes, without what a terminal would obey."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        shown = "\n".join(map(visible, text.split("\n")))
        print(shown, end="\n" if stream_end else "", flush=True)
