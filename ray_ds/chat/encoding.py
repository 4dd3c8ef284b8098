"""Messages as tokens, and which of them are an answer's."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_ds.chat.template import ChatTemplate, Message
from ray_ds.errors import InputError
from ray_ds.tokenizer import BpeTokenizer

ASSISTANT = "assistant"
_PRIVATE_USE = range(0xE000, 0xF900)


@dataclass(slots=True)
class EncodedChat:
    """A conversation's tokens."""

    tokens: list[int] = field(default_factory=list)
    is_answer: list[bool] = field(default_factory=list)
    """Of each token, whether the assistant says it: what is learnt."""


class ChatEncoder:
    """Turns messages into tokens: special tokens where the template wrote them, text wherever a message did."""

    def __init__(self, template: ChatTemplate, tokenizer: BpeTokenizer) -> None:
        self.template = template
        self._tokenizer = tokenizer
        names = sorted(tokenizer.special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(re.escape(name) for name in names))

    def encode(self, messages: Sequence[Message], *, first_answer: int = 0) -> EncodedChat:
        """Return a whole conversation.

        An answer is what the template adds for an assistant's message to the messages before it and the words that ask
        for an answer, up to the special token that ends it. It is encoded apart from these, as it is when a model has
        to write it.

        Args:
            first_answer: place of the first message whose answer is learnt.
        Raises:
            InputError: the template does not render the messages, or rewrites earlier ones when an answer follows.
        """
        guarded, guard = self._guard(messages)
        encoded, done = EncodedChat(), ""
        for place, message in enumerate(messages):
            if message.get("role") != ASSISTANT or place < first_answer:
                continue
            before = self._render(guarded[:place], add_generation_prompt=True)
            after = self._render(guarded[: place + 1])
            if not before.startswith(done) or not after.startswith(before):
                allowed = "must be rendered after the messages before it and leave these as they are"
                action = "use a template that only adds, or conversations of one answer"
                raise InputError(f"message {place}", ASSISTANT, allowed, action)
            answer, behind = self._end_of_turn(after[len(before) :])
            self._add(encoded, before[len(done) :], guard, is_answer=False)
            self._add(encoded, answer, guard, is_answer=True)
            self._add(encoded, behind, guard, is_answer=False)
            done = after
        whole = self._render(guarded)
        if not whole.startswith(done):
            raise InputError(
                "messages", "the last ones", "must leave those before them as they are", "use another template"
            )
        self._add(encoded, whole[len(done) :], guard, is_answer=False)
        return encoded

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return messages as the prompt that an answer follows."""
        guarded, guard = self._guard(messages)
        encoded = EncodedChat()
        self._add(encoded, self._render(guarded, add_generation_prompt=True), guard, is_answer=False)
        return encoded.tokens

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        names = {"bos_token": self._tokenizer.bos_token, "eos_token": self._tokenizer.eos_token}
        return self.template.render(messages, add_generation_prompt=add_generation_prompt, **names)

    def _guard(self, messages: Sequence[Message]) -> tuple[list[Message], str]:
        """Return messages in which no special token is spelled, and the character that was put into those there were.

        So that what the template writes can be told from what a message says after both are one text.
        """
        text = repr(messages)
        guard = next(chr(code) for code in _PRIVATE_USE if chr(code) not in text)

        def guarded(value: Any) -> Any:
            if isinstance(value, str):
                return self._special.sub(lambda found: found[0][:1] + guard + found[0][1:], value)
            if isinstance(value, dict):
                return {key: guarded(inner) for key, inner in value.items()}
            return [guarded(inner) for inner in value] if isinstance(value, list) else value

        return [guarded(dict(message)) for message in messages], guard

    def _end_of_turn(self, answer: str) -> tuple[str, str]:
        """Return an answer up to its last special token, and the blanks behind that."""
        bare = answer.rstrip()
        ends = any(bare.endswith(name) for name in self._tokenizer.special_ids)
        return (bare, answer[len(bare) :]) if ends else (answer, "")

    def _add(self, encoded: EncodedChat, text: str, guard: str, *, is_answer: bool) -> None:
        """Add rendered text to a conversation's tokens."""
        ids = [token for part in self._parts(text) for token in self._encode_part(part, guard)]
        encoded.tokens += ids
        encoded.is_answer += [is_answer] * len(ids)

    def _parts(self, text: str) -> Iterator[str]:
        """Yield special tokens and the texts between them."""
        at = 0
        for found in self._special.finditer(text):
            yield text[at : found.start()]
            yield found[0]
            at = found.end()
        yield text[at:]

    def _encode_part(self, part: str, guard: str) -> list[int]:
        special = self._tokenizer.special_ids.get(part)
        return [special] if special is not None else self._tokenizer.encode(part.replace(guard, ""))
