"""Chats as lm-evaluation-harness passes them on, as text, and as the model reads them, as tokens."""

from collections.abc import Sequence

from ray_ds.chat.encoding import ChatEncoder
from ray_ds.chat.template import Message
from ray_ds.errors import InputError
from ray_ds.tokenizer import BpeTokenizer

_MARK = "\uf8ff "
"""Shows where a message ends in what a template made of it; without its blank, if the template trims messages."""


class LmEvalChats:
    """The chats that the harness had rendered, by their text.

    It renders messages into a text and asks for what follows that text. A template's special tokens cannot be told from
    a message's text there, so that the tokens are made together with the text, and found by it again.
    """

    def __init__(self, encoder: ChatEncoder, tokenizer: BpeTokenizer) -> None:
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._openings: dict[str, tuple[tuple[int, ...], str]] = {}

    @property
    def template(self) -> str:
        """The model's chat template."""
        return self._encoder.template.source

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Return messages as text, as transformers' `apply_chat_template` does.

        Args:
            add_generation_prompt: whether what an answer begins with comes last; otherwise the last message is an
                answer's beginning, which is to be continued.
        Raises:
            InputError: the template refuses the messages, or does not render an answer after what asks for one.
        """
        if add_generation_prompt:
            text = self._render(messages, add_generation_prompt=True)
            self._openings[text] = (tuple(self._encoder.encode_prompt(messages)), "")
            return text
        *before, last = messages
        prompt, text = self._render(before, add_generation_prompt=True), self._begin(messages)
        if not text.startswith(prompt):
            allowed = "must be rendered after the words that ask for an answer"
            raise InputError("gen_prefix", last["content"], allowed, "remove it from the task, or use another template")
        self._openings[text] = (tuple(self._encoder.encode_prompt(before)), text[len(prompt) :])
        return text

    def opening(self, text: str) -> tuple[tuple[int, ...], str]:
        """Return a chat's tokens up to its last answer, and what this begins with; for other text no tokens, and it."""
        return self._openings.get(text, ((), text))

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        marks = {"bos_token": self._tokenizer.bos_token, "eos_token": self._tokenizer.eos_token}
        return self._encoder.template.render(messages, add_generation_prompt=add_generation_prompt, **marks)

    def _begin(self, messages: Sequence[Message]) -> str:
        """Return messages as text up to the end of the last one's content."""
        *before, last = messages
        marked = [*before, {**last, "content": last["content"] + _MARK}]
        text = self._render(marked, add_generation_prompt=False)
        at = text.rfind(_MARK.rstrip())
        if at < 0:
            raise InputError("gen_prefix", last["content"], "must be rendered by the template", "use another template")
        return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()
