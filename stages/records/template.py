"""How a base's chat template asks for an answer, and how it shows one.

Every answer is taken as the model sees it when it has to give it: the chat before it with the generation prompt, which
the template may show otherwise once the chat goes on (thoughts of earlier turns go, the last turn gets a block for
them). So a chat of several answers is several pairs of prompt and answer, each rendered on its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from stages.errors import MistakeError, first_line
from stages.files import BASE
from stages.records.record import THINK, THOUGHT, without_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.records.record import Record, Span

MARK = "\ufffc"  # stands in for a message, to see where a chat template puts it
TODAY = datetime(2025, 1, 1)  # for templates that write a date: what is learned must not depend on the day
CODES = (
    "%D",
    "%x",
    "%X",
    "%R",
    "%d",
    "%m",
    "%Y",
    "%y",
    "%B",
    "%b",
    "%A",
    "%a",
    "%H",
    "%I",
    "%M",
    "%S",
    "%p",
    "%j",
    "%e",
    "%-d",
    "%-m",
    "%F",
    "%T",
)
WORDS = 5  # of a message, by which it is known that a template shows it: some escape or trim the rest
OTHERWISE = (
    "a record has a chat that the chat template of base.model shows otherwise than it asks for it; use prompt and"
    " completion with format: plain"
)


@dataclass(frozen=True)
class Text:
    """Text and its weights: `weight`, but for the characters of `spans`, of which later ones win."""

    text: str
    weight: float = 0.0
    spans: list[Span] = field(default_factory=list)


@dataclass(frozen=True)
class Chat:
    """The messages of one record and what else its template is told."""

    messages: list[Record]
    tokenizer: PreTrainedTokenizerBase
    tools: Any = None
    keywords: dict[str, Any] = field(default_factory=dict)

    @property
    def template(self) -> str:
        """The base's chat template.

        Raises:
            MistakeError: it has none, or several and no default.
        """
        try:
            return str(self.tokenizer.get_chat_template(tools=self.tools))
        except ValueError:
            if named := self.tokenizer.chat_template:
                raise MistakeError(
                    f"a record is asked as a chat, and base.model of params.yaml has the chat templates"
                    f" {', '.join(sorted(named))} and none called default; call one of them so"
                ) from None
            raise MistakeError(
                "a record has messages, and base.model of params.yaml has no chat template for them; use a chat model,"
                " or records with prompt and completion"
            ) from None

    @property
    def end(self) -> tuple[str | None, str]:
        """The token that ends an answer in the template, if one does, and all that follows an answer.

        Raises:
            MistakeError: the template does not show what the assistant says.
        """
        return turn_end(self.tokenizer, self.template)

    @property
    def lead(self) -> str:
        """What the template puts between the generation prompt and what the assistant says, if it is no thought.

        gpt-oss names the channel there. A space belongs to what is said.
        """
        lead = turn_lead(self.tokenizer, self.template) or ""
        return "" if THOUGHT in lead or not lead.strip() else lead

    def answers(self) -> Iterator[tuple[Text, Text]]:
        """All before an answer, and the answer up to the token that ends it, for each that counts, and the last.

        A message of the assistant is an answer where somebody has asked: the greeting that opens a chat is none.

        Raises:
            MistakeError: the template is missing, refuses the chat, or does not show what was said.
        """
        done, last = 0, len(self.messages) - 1
        for place, message in enumerate(self.messages):
            if not self._is_answer(place) or not (_counts(message, 1.0) or place == last):
                continue
            prompt = self.render(self.messages[:place], ask=True)
            shown = self.render(self.messages[: place + 1])
            learned = [span for earlier in range(done, place) for span in self._weights(earlier, prompt)]
            answer = self._answer(prompt, shown, message)
            self._check_shown(self.messages[done:place], prompt, message, answer)
            spans = _moved(message, self._find(place, shown) - len(prompt)) if message.get("spans") else []
            if spans and not shown.startswith(prompt):
                raise MistakeError(OTHERWISE)
            yield Text(prompt, 0.0, learned), Text(answer, weight_of(message, "weight", 1.0), spans)
            done = place + 1

    def render(self, messages: list[Record], ask: bool = False) -> str:
        """Messages as the template shows them, and with `ask` what asks for the next answer.

        Raises:
            MistakeError: the template refuses them.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    self.tools,
                    chat_template=dated(self.template),
                    tokenize=False,
                    add_generation_prompt=ask,
                    **self.keywords,
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise MistakeError(
                f"a record has a chat that the chat template of base.model refuses ({first_line(error)}); change its"
                " roles or what its messages hold"
            ) from None

    def _is_answer(self, place: int) -> bool:
        asked = any(message["role"] == "user" for message in self.messages[:place])
        return asked and self.messages[place]["role"] == "assistant"

    def _answer(self, prompt: str, shown: str, message: Record) -> str:
        """What follows the prompt, up to the token that ends it."""
        stop, tail = self.end
        if shown.startswith(prompt):
            answer = shown[len(prompt) :]
        elif prompt.rstrip().endswith(THINK) and THOUGHT not in message["content"]:
            thoughts = message.get("reasoning_content") or ""  # none to learn leaves the block empty
            answer = f"{thoughts}\n{THOUGHT}\n\n{message['content']}{tail}"
        elif prompt.rstrip().endswith(THINK):
            thoughts = message["content"].lstrip().removeprefix(THINK)
            answer = f"{thoughts.lstrip() if prompt[-1].isspace() else thoughts}{tail}"
        elif prompt.rstrip().endswith(THOUGHT):
            answer = f"{without_thinking(message['content'])}{tail}"  # it is asked not to think
        elif (lead := turn_lead(self.tokenizer, self.template)) is not None:
            answer = f"{lead}{message['content']}{tail}"  # what came before is shown otherwise once it is answered
        else:
            raise MistakeError(OTHERWISE)
        if stop and stop in answer:
            return answer[: answer.rindex(stop) + len(stop)]
        return answer.removesuffix(tail) if tail else answer

    def _check_shown(self, before: list[Record], prompt: str, message: Record, answer: str) -> None:
        """Refuse a chat of which the template leaves out a message, or a part of the answer.

        Thoughts of earlier answers may go, and those of one that is asked not to think.
        """
        told = [(each["role"], each["content"], prompt) for each in before if each["role"] != "assistant"]
        told.append(("assistant", without_thinking(message["content"]), answer))
        told += [
            ("assistant", call.get("function", call).get("name", ""), answer)
            for call in message.get("tool_calls") or []
        ]
        if not prompt.rstrip().endswith(THOUGHT):
            told.append(("assistant", message.get("reasoning_content") or "", answer))
        for role, content, text in told:
            if not all(word in text for word in re.findall(r"\w+", str(content))[:WORDS]):
                raise MistakeError(
                    f"a record has a message of role {role} that the chat template of base.model does not show in full"
                    f" ({str(content)[:40]!r}); leave such messages out, or choose a base that knows them"
                )

    def _weights(self, place: int, text: str) -> list[Span]:
        """Spans over `text` of the weights of one message that is no answer: of its content and all that ends it."""
        message = self.messages[place]
        if not _counts(message, 0.0):
            return []
        start = self._find(place, text)
        shown = self.render(self.messages[: place + 1])
        end = len(shown) if text.startswith(shown) else start + len(message["content"])
        return [(start, end, weight_of(message, "weight", 0.0)), *_moved(message, start)]

    def _find(self, place: int, text: str) -> int:
        """Where the content of one message starts in `text`; searching for it might find a role of the same name."""
        marked = [*self.messages[:place], self.messages[place] | {"content": MARK}]
        start = self.render(marked).find(MARK)
        if start < 0 or not text.startswith(self.messages[place]["content"], start):
            raise MistakeError(
                "a record has a weight or spans in a message that the chat template of base.model changes; remove"
                " spaces at its ends, or use prompt and completion"
            )
        return start


def as_chat(record: Record, tokenizer: PreTrainedTokenizerBase) -> Chat | None:
    """The record as a chat; None where it is a text or is asked for in plain text.

    A prompt and its completion are one question and its answer where the base has a chat template: that is how a
    model that has one is asked. The prompt is said as it is; spaces at the ends of the answer are left out.
    """
    messages = record.get("messages")
    if "prompt" in record and record.get("format", "chat" if tokenizer.chat_template else "plain") == "chat":
        messages = [
            {"role": "user", "content": record["prompt"], "weight": record.get("prompt_weight")},
            {"role": "assistant", "weight": record.get("weight")} | _stripped(record["completion"], spans_of(record)),
        ]
    if messages is None:
        return None
    return Chat(messages, tokenizer, record.get("tools"), record.get("chat_template_kwargs") or {})


def check_template(record: Record, where: str) -> None:
    """Refuse a chat, or a question and its answer, that the base's chat template does not take, if the base is there.

    Raises:
        MistakeError: in a sentence that starts with `where`.
    """
    if not BASE.is_dir():
        return
    chat = as_chat(record, _tokenizer(str(BASE.resolve())))
    try:
        for _ in chat.answers() if chat else ():
            pass
    except MistakeError as error:
        raise MistakeError(str(error).replace("a record", where, 1)) from None


@lru_cache(maxsize=1)
def _tokenizer(folder: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@lru_cache(maxsize=8)
def dated(template: str) -> str:
    """The template with a macro of its own in place of the function that tells the day: it always tells TODAY.

    Transformers gives a template no function of ours; a macro of that name hides its own.
    """
    if "strftime_now" not in template:
        return template
    told = "".join(f" | replace({code!r}, {TODAY.strftime(code)!r})" for code in CODES)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{told} }}}}{{%- endmacro %}}{template}"


@lru_cache(maxsize=8)
def turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str | None, str]:
    """See `Chat.end`; `template` is the tokenizer's, which may be given it anew."""
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    shown = Chat(asked, tokenizer).render(asked)
    if MARK not in shown:
        raise MistakeError(
            "a record has a chat, and the chat template of base.model does not show what the assistant says"
        )
    tail = shown[shown.index(MARK) + 1 :]
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()} | {*tokenizer.all_special_tokens}
    found = re.search("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))), tail) if tokens else None
    return (found[0] if found else None), tail


@lru_cache(maxsize=8)
def turn_lead(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """What stands between a generation prompt and the answer; None where the prompt is shown otherwise later on."""
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    prompt, shown = Chat(asked, tokenizer).render(asked[:1], ask=True), Chat(asked, tokenizer).render(asked)
    return shown[len(prompt) : shown.index(MARK)] if shown.startswith(prompt) and MARK in shown else None


def weight_of(owner: Record, key: str, default: float) -> float:
    """A weight of a record or message; None is as good as nothing."""
    value = owner.get(key)
    return default if value is None else float(value)


def spans_of(owner: Record) -> list[Span]:
    """The spans of a record or message, as numbers."""
    return [(int(start), int(end), float(weight)) for start, end, weight in owner.get("spans") or []]


def _counts(message: Record, default: float) -> bool:
    return bool(weight_of(message, "weight", default) or message.get("spans"))


def _moved(message: Record, first: int) -> list[Span]:
    return [(first + start, first + end, weight) for start, end, weight in spans_of(message)]


def _stripped(text: str, spans: list[Span]) -> Record:
    """A message's content without spaces at its ends, and its spans."""
    content = text.strip()
    first = text.index(content)
    moved = [(max(start - first, 0), min(end - first, len(content)), weight) for start, end, weight in spans]
    return {"content": content, "spans": [span for span in moved if span[0] < span[1]]}
