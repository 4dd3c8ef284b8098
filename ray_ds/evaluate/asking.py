"""Questions as tokens: in plain text, or in the turns of a chat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray_ds.chat.encoding import ChatEncoder
from ray_ds.config.tasks import TaskSettings
from ray_ds.errors import InputError
from ray_ds.evaluate.continuations import Continuation, Key, cut_left, encode_choices
from ray_ds.evaluate.generation import Prompt, fit_prompt
from ray_ds.evaluate.questions import Question
from ray_ds.tokenizer import BpeTokenizer


@dataclass(frozen=True, kw_only=True)
class AskedTask:
    """The questions of a task as tokens."""

    settings: TaskSettings
    questions: Sequence[Question]
    continuations: Mapping[Key, Continuation]
    """By (task, question, choice), where the model chooses."""
    prompts: Sequence[Prompt]
    """Where it writes; their keys are (task, question)."""
    cut: frozenset[int]
    """Questions whose prompts lost their beginning."""


def ask_task(
    number: int,
    task: TaskSettings,
    questions: Sequence[Question],
    tokenizer: BpeTokenizer,
    seq_len: int,
    chat: ChatEncoder | None = None,
) -> AskedTask:
    """Encode questions and see to it that they fit a model that sees `seq_len` tokens.

    Args:
        chat: how the model reads messages; needed where the task is a chat.
    Raises:
        InputError: one is too long, or the chat template refuses it; the message names it.
    """
    continuations: dict[Key, Continuation] = {}
    prompts: list[Prompt] = []
    cut: set[int] = set()
    for i, question in enumerate(questions):
        if task.generate is not None:
            tokens = _encode_prompt(task, question, tokenizer, chat)
            room = len(tokens) + task.generate.max_new_tokens - 1
            fitting = fit_prompt(tokens, task.generate.max_new_tokens, seq_len, tokenizer.bos_id)
            if fitting is not None:
                prompts.append(
                    Prompt(
                        key=(number, i),
                        tokens=fitting,
                        max_new_tokens=task.generate.max_new_tokens,
                        stop=task.generate.stop,
                        temperature=task.generate.temperature,
                        seed=f"{task.seed} {question.prompt}",
                    )
                )
        else:
            encoded = _encode_choices(task, question, tokenizer, chat)
            room = max(len(own.inputs) for own in encoded)
            shorter = cut_left(encoded, seq_len, tokenizer.bos_id)
            fitting = None if shorter is None else ()
            continuations |= {(number, i, choice): own for choice, own in enumerate(shorter or ())}
        if room > seq_len:
            if fitting is None or task.too_long == "refuse":
                raise _too_long(task, question, room, seq_len, can_cut=fitting is not None and not task.chat)
            cut.add(i)
    return AskedTask(
        settings=task, questions=questions, continuations=continuations, prompts=prompts, cut=frozenset(cut)
    )


def _encode_prompt(
    task: TaskSettings, question: Question, tokenizer: BpeTokenizer, chat: ChatEncoder | None
) -> tuple[int, ...]:
    """Return the tokens that an answer follows."""
    if not task.chat:
        return tuple(tokenizer.encode_prompt(question.prompt))
    assert chat is not None
    try:
        return tuple(chat.encode_prompt(question.messages))
    except InputError as error:
        raise InputError(f"task {task.name}: {error.field}", error.value, error.allowed, error.action) from error


def _encode_choices(
    task: TaskSettings, question: Question, tokenizer: BpeTokenizer, chat: ChatEncoder | None
) -> list[Continuation]:
    """Return a question's prompt continued by each choice; in a chat an answer is encoded apart, as it is learnt."""
    if not task.chat:
        return encode_choices(tokenizer, question.prompt, [f"{task.joiner}{choice}" for choice in question.choices])
    prompt = _encode_prompt(task, question, tokenizer, chat)
    answers = tokenizer.encode_batch(question.choices)
    return [Continuation(tokens=(*prompt, *answer), start=len(prompt)) for answer in answers]


def _too_long(task: TaskSettings, question: Question, room: int, seq_len: int, *, can_cut: bool) -> InputError:
    """Return the complaint about a question that does not fit."""
    action = "ask for fewer shots"
    if can_cut:
        action += ', or set too_long = "cut_left" to cut the beginning off'
    allowed = f"must fit, with its answer, into seq_len = {seq_len}"
    return InputError(f"task {task.name}: {question.place}", f"{room} tokens", allowed, action)
