"""Questions as the model is asked them: prompts with shots, or messages of a chat; choices, and what is right."""

import dataclasses
import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ray_ds.chat.encoding import ASSISTANT
from ray_ds.chat.template import Message
from ray_ds.config.tasks import AnswerForm, Choose, Generate, TaskSettings
from ray_ds.config.templates import MissingValueError, as_text, fill_template, text_at, value_at
from ray_ds.errors import ConfigError, InputError
from ray_ds.evaluate.task_files import Item, read_items


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One item of a task, ready to be asked."""

    name: str
    """The item's file and row."""
    place: str
    """The same, for people."""
    own_prompt: str
    """The item's prompt alone."""
    prompt: str
    """What the model reads: preamble, shots and the item's prompt; in a chat the item's prompt alone."""
    messages: tuple[Message, ...] = ()
    """In a chat, what it reads: preamble, shots and the item's prompt as messages."""
    choices: tuple[str, ...] = ()
    """What it chooses among; none where it writes the answer."""
    right: int | None = None
    """Which choice is right."""
    references: tuple[str, ...] = ()
    """The right answers, where it writes one."""

    @property
    def answer(self) -> str:
        """Return the right answer, as a shot shows it."""
        return self.references[0] if self.right is None else self.choices[self.right]

    @property
    def sha256(self) -> str:
        """Return 16 hexadecimal digits of all that the model is asked and what is right."""
        parts = repr((self.messages or self.prompt, self.choices, self.right, self.references))
        return hashlib.sha256(parts.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


def read_questions(task: TaskSettings) -> list[Question]:
    """Return the questions of a task, drawn and with their shots, in order of file and row.

    Raises:
        InputError: a file is missing or damaged, an item lacks what the task asks for (the message names file, row and
            field), or there are too few examples for the shots.
    """
    questions = [_make_question(task, item) for item in read_items(task)]
    pool = questions
    if task.shot_files is not None:
        pool = [_make_question(task, item) for item in read_items(task, shots=True)]
    if task.max_items is not None and task.max_items < len(questions):
        drawn = random.Random(f"items {task.seed}").sample(range(len(questions)), task.max_items)
        questions = [questions[i] for i in sorted(drawn)]
    num_same = Counter(shot.own_prompt for shot in pool)
    return [_with_shots(task, question, pool, num_same[question.own_prompt]) for question in questions]


def _with_shots(task: TaskSettings, question: Question, pool: Sequence[Question], num_same: int) -> Question:
    """Return a question behind its shots, which depend on the seed, the question and the pool alone.

    Args:
        num_same: examples of the pool that ask what the question asks, which are no shots for it.
    """
    if len(pool) - num_same < task.shots:
        raise ConfigError(
            f"task {task.name}: shots",
            task.shots,
            f"must be at most {len(pool) - num_same}, the examples that do not ask what {question.place} asks",
            "ask for fewer, or name more shot_files",
        )
    rng = random.Random(f"shots {task.seed} {question.own_prompt}")
    drawn: dict[int, Question] = {}
    while len(drawn) < task.shots:
        place = rng.randrange(len(pool))
        if pool[place].own_prompt != question.own_prompt:
            drawn[place] = pool[place]
    if task.chat:
        return dataclasses.replace(question, messages=tuple(_messages(task, question, list(drawn.values()))))
    shots = (f"{shot.own_prompt}{task.joiner}{shot.answer}{task.shot_separator}" for shot in drawn.values())
    prompt = "".join([task.preamble, *shots, question.own_prompt])
    return dataclasses.replace(question, prompt=prompt)


def _messages(task: TaskSettings, question: Question, shots: Sequence[Question]) -> Iterator[Message]:
    """Yield a question behind its shots as the messages of a chat."""
    if task.preamble:
        yield {"role": "system", "content": task.preamble}
    for shot in shots:
        yield {"role": "user", "content": shot.own_prompt}
        yield {"role": ASSISTANT, "content": shot.answer}
    yield {"role": "user", "content": question.own_prompt}


def _make_question(task: TaskSettings, item: Item) -> Question:
    """Return an item's question without shots."""
    try:
        prompt = fill_template(task.prompt, item.values)
        choices, right, references = _answers(task, item)
    except MissingValueError as error:
        field = f"{item.place}, field {error.place}"
        raise InputError(
            field, error.found, error.allowed, f"mend the item, or the settings of task {task.name}"
        ) from error
    return Question(
        name=item.name,
        place=item.place,
        own_prompt=prompt,
        prompt=prompt,
        choices=choices,
        right=right,
        references=references,
    )


def _answers(task: TaskSettings, item: Item) -> tuple[tuple[str, ...], int | None, tuple[str, ...]]:
    """Return an item's choices and which is right, or its right answers."""
    if task.generate is not None:
        return (), None, tuple(_references(task.generate, item))
    if task.choose is not None:
        choices = tuple(_choices(task.choose, item))
        return choices, _right_choice(item, choices, task.choose.answer, task.choose.answer_form), ()
    assert task.classify is not None
    labels = task.classify.labels
    return labels, _right_choice(item, labels, task.classify.answer, task.classify.answer_form), ()


def _choices(choose: Choose, item: Item) -> Iterator[str]:
    if isinstance(choose.choices, str):
        found = value_at(item.values, choose.choices)
        if not isinstance(found, list) or len(found) < 2:
            held = f"{len(found)} values" if isinstance(found, list) else type(found).__name__
            raise MissingValueError(choose.choices, held, "must be a list of two choices or more")
        named = [
            (f"{choose.choices}[{i}]", as_text(choice, f"{choose.choices}[{i}]")) for i, choice in enumerate(found)
        ]
    else:
        named = [(choice, fill_template(choice, item.values)) for choice in choose.choices]
    for place, text in named:
        if not text:
            raise MissingValueError(place, "empty", "must be a text")
        yield text


def _references(generate: Generate, item: Item) -> Iterator[str]:
    if generate.answer is not None:
        yield fill_template(generate.answer, item.values)
        return
    place = str(generate.answers)
    found = value_at(item.values, place)
    if not isinstance(found, list) or not found:
        held = "an empty list" if isinstance(found, list) else type(found).__name__
        raise MissingValueError(place, held, "must be a list of one right answer or more")
    yield from (as_text(answer, f"{place}[{i}]") for i, answer in enumerate(found))


def _right_choice(item: Item, choices: Sequence[str], place: str, form: AnswerForm) -> int:
    """Return which choice an item says is right.

    Raises:
        MissingValueError: it says none of them.
    """
    found = text_at(item.values, place).strip() if form != "text" else text_at(item.values, place)
    known = {
        "text": list(choices),
        "index": [str(i) for i in range(len(choices))],
        "number": [str(i + 1) for i in range(len(choices))],
        "letter": [chr(ord("A") + i) for i in range(len(choices))],
    }[form]
    if found not in known:
        raise MissingValueError(place, found, f"must be the {form} of a choice: {', '.join(known)}")
    return known.index(found)
