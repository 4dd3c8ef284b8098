"""Chat templates: jinja with what Hugging Face's `apply_chat_template` gives it (transformers 5.23,
utils/chat_template_utils.py), so that a template means the same here and there."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ray_ds.errors import InputError

TEMPLATE_FILE = "chat_template.jinja"
"""Hugging Face's name for it, beside `tokenizer.json`."""

DEFAULT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- message.role + "\\n" + message.content + eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "assistant\\n" -}}
{%- endif -%}
"""
"""A turn is a role's name, a line end, the text and EOS. It needs no tokens but BOS and EOS, which every tokenizer has;
since text never becomes one of these, no message can forge a turn."""

ROLE_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role not in ["system", "user", "assistant", "tool"] -%}
{{- raise_exception("a role must be system, user, assistant or tool") -}}
{%- endif -%}
{{- "<|" + message.role + "|>" + message.content + eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|assistant|>" -}}
{%- endif -%}
"""
"""A turn is the token of its role, the text and EOS; for our tokenizers, which have `ROLE_TOKENS`."""

Message = Mapping[str, Any]
"""`role` and `content`, strings, and whatever else a template reads."""


class _Generation(Extension):
    """`{% generation %}`, with which Hugging Face's templates mark answers: what is in it is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  # jinja declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what lies between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """How messages become text."""

    def __init__(self, source: str) -> None:
        """Take a template.

        Raises:
            InputError: it is no jinja.
        """
        self.source = source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"{TEMPLATE_FILE} line {error.lineno}", str(error), "must be jinja", "correct it"
            ) from error

    def render(
        self, messages: Sequence[Message], *, bos_token: str, eos_token: str, add_generation_prompt: bool = False
    ) -> str:
        """Return messages as text.

        Args:
            add_generation_prompt: whether what an answer begins with comes last, for the model to go on.
        Raises:
            InputError: the template refuses the messages, or reads what they lack.
        """
        try:
            return self._template.render(
                messages=messages,
                bos_token=bos_token,
                eos_token=eos_token,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
            )
        except (jinja2.TemplateError, TypeError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            allowed = f"must be what the chat template takes ({error})"
            raise InputError("messages", f"roles {roles}", allowed, "correct them, or use another template") from error


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
