"""Settings of tasks: questions with right answers, put to a model. A new task is a table in the recipe, not code.

[[step.settings.tasks]]
name = "capitals"
files = "sets/capitals.jsonl"
prompt = "Question: {question}\\nAnswer:"
shots = 3
choose = { choices = "options", answer = "right", length_normalisation = "bytes" }
"""

import re
from typing import Annotated, Literal

import pydantic

from ray_ds.config.settings import OUTPUT_UNCHANGED, fill_or_refuse, settings
from ray_ds.config.templates import check_place, check_template
from ray_ds.errors import ConfigError

AnswerForm = Literal["text", "index", "number", "letter"]
LengthNormalisation = Literal["none", "tokens", "bytes"]
TextStep = Literal["lower", "punctuation", "articles", "whitespace"]
GenerateMetric = Literal["exact_match", "bleu"]
BleuTokenizer = Literal["13a", "intl", "zh", "char", "none"]


@settings
class Choose:
    """The model chooses the likeliest of an item's choices; the score is accuracy."""

    choices: str | tuple[str, ...]
    """The column that holds an item's list of choices, or a template for each, as in `["{right}", "{wrong}"]`."""
    answer: str
    """The column that says which choice is right."""
    answer_form: AnswerForm = "index"
    """How it says so: the choice's `text`; its `index`, from 0; its `number`, from 1; its `letter`, from A."""
    length_normalisation: LengthNormalisation
    """What a choice's log-probability is divided by before it is compared: nothing, its tokens, or its UTF-8 bytes."""

    def __post_init__(self) -> None:
        check_place("answer", self.answer)
        if isinstance(self.choices, str):
            check_place("choices", self.choices)
            return
        if len(self.choices) < 2:
            raise ConfigError("choices", list(self.choices), "must be two templates or more", "add the others")
        for i, choice in enumerate(self.choices):
            check_template(f"choices.{i}", choice)


@settings
class Classify:
    """The model chooses the likeliest of the same labels for every item; the scores are accuracy and macro-F1."""

    labels: tuple[str, ...]
    """The classes, as the model reads them."""
    answer: str
    """The column that says which label is right."""
    answer_form: AnswerForm = "text"
    """How it says so: the label's `text`; its `index`, from 0; its `number`, from 1; its `letter`, from A."""
    length_normalisation: LengthNormalisation
    """What a label's log-probability is divided by before it is compared: nothing, its tokens, or its UTF-8 bytes."""

    def __post_init__(self) -> None:
        check_place("answer", self.answer)
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels) or not all(self.labels):
            raise ConfigError("labels", list(self.labels), "must be two texts or more, each once", "correct them")


@settings
class Generate:
    """The model writes an answer, which is compared with one right answer or several."""

    metrics: tuple[GenerateMetric, ...]
    """`exact_match`: the share of answers equal to a right one; `bleu`: corpus BLEU, by sacrebleu."""
    max_new_tokens: pydantic.PositiveInt
    """Tokens of an answer at most."""
    answer: str | None = None
    """A template of the right answer."""
    answers: str | None = None
    """Instead, the column that holds a list of right answers; shots show the first."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer and are not part of it; the end of a document ends it too."""
    temperature: pydantic.NonNegativeFloat = 0.0
    """0 = always the likeliest token; else tokens are drawn, by the task's seed."""
    extract: str | None = None
    """A regular expression; what its first group (or all of it) last matches in an answer is compared, as in
    `#### (-?[0-9.,]+)`. An answer without a match is wrong."""
    normalise: tuple[TextStep, ...] | None = None
    """What is done, in this order, to answers and right answers before they must be equal: `lower` case, drop
    `punctuation`, drop `articles` (a, an, the), join `whitespace` to single blanks. Default: whitespace."""
    bleu_tokenizer: BleuTokenizer | None = None
    """How sacrebleu cuts texts into words. Default: 13a."""

    def __post_init__(self) -> None:
        if not self.metrics or len(set(self.metrics)) != len(self.metrics):
            raise ConfigError("metrics", list(self.metrics), "must be exact_match, bleu or both", "correct them")
        if (self.answer is None) == (self.answers is None):
            value = "neither" if self.answer is None else "both"
            raise ConfigError("answer", value, "must be given, or else answers, and not both", "give one of the two")
        if self.answer is not None:
            check_template("answer", self.answer)
        else:
            check_place("answers", str(self.answers))
        if not all(self.stop):
            raise ConfigError("stop", list(self.stop), "must hold no empty text", "remove it")
        no_match = None if "exact_match" in self.metrics else "has no effect without the metric exact_match"
        fill_or_refuse(self, "normalise", ("whitespace",), unused=no_match)
        if self.extract is not None:
            self._check_extract(no_match)
        no_bleu = None if "bleu" in self.metrics else "has no effect without the metric bleu"
        fill_or_refuse(self, "bleu_tokenizer", "13a", unused=no_bleu)

    def _check_extract(self, unused: str | None) -> None:
        if unused is not None:
            raise ConfigError("extract", self.extract, unused, "remove it")
        try:
            re.compile(str(self.extract))
        except re.error as error:
            raise ConfigError("extract", self.extract, f"must be a regular expression ({error})", "mend it") from error


@settings
class TaskSettings:
    """Settings of one task: where its items are, how they are asked, and what is right."""

    name: str
    """What the task is called in reports."""
    files: Annotated[str, OUTPUT_UNCHANGED]
    """Files of items: an absolute path or an s3:// or gs:// URI; `*` and `?` stay within a folder, `**` does not.
    jsonl (also .gz and .zst), a line an item, or parquet, a row an item."""
    prompt: str
    """The question, with columns in braces: `Question: {question}\\nAnswer:`. `{{` and `}}` stand for braces."""
    choose: Choose | None = None
    """The model chooses among choices of each item."""
    classify: Classify | None = None
    """Instead: it chooses among labels."""
    generate: Generate | None = None
    """Instead: it writes the answer."""
    chat: bool = False
    """Ask in turns, as the model's chat template writes them: `preamble` is the system message, each shot a question
    and an answer, and the answer is what the assistant says next."""
    joiner: str | None = None
    """What stands between a prompt and its answer, in front of every choice and in shots. Default: a blank; in a chat
    the template says."""
    preamble: str = ""
    """What stands once in front of shots and question."""
    shots: pydantic.NonNegativeInt = 0
    """Answered examples in front of each question, drawn anew for each; never a question itself."""
    shot_files: Annotated[str | None, OUTPUT_UNCHANGED] = None
    """Files that shots are drawn from; without it, the task's own."""
    shot_separator: str | None = None
    """What stands behind each shot. Default: an empty line; in a chat the template says."""
    max_items: pydantic.PositiveInt | None = None
    """Items to ask at most, drawn by the seed; without it, all."""
    too_long: Literal["refuse", "cut_left"] = "refuse"
    """What happens to a prompt that does not fit into `seq_len` with its answer: the step is refused, or the prompt
    loses its beginning; the report counts how often."""
    seed: int = 0
    """Of the draws of shots, items and sampled answers, and of resampling for intervals."""
    source: str = "not stated"
    """Where the items come from, recorded with the result."""
    licence: str = "not stated"
    """The items' licence, recorded with the result."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", self.name):
            raise ConfigError("name", self.name, "must be letters, digits, _, . and -", "choose another")
        if not self.files:
            raise ConfigError("files", self.files, "must name files", "give an absolute path, such as /data/*.jsonl")
        given = [kind for kind in ("choose", "classify", "generate") if getattr(self, kind) is not None]
        if len(given) != 1:
            value = ", ".join(given) or "none"
            raise ConfigError("choose, classify, generate", value, "must be exactly one of the three", "give one")
        check_template("prompt", self.prompt)
        if self.shots == 0 and self.shot_files is not None:
            raise ConfigError("shot_files", self.shot_files, "has no effect without shots", "remove it, or set shots")
        no_text = "has no effect in a chat, whose template joins the turns" if self.chat else None
        fill_or_refuse(self, "joiner", " ", unused=no_text)
        no_shots = None if self.shots else "has no effect without shots"
        fill_or_refuse(self, "shot_separator", "\n\n", unused=no_text or no_shots)
        if self.chat and self.too_long == "cut_left":
            allowed = "must be refuse in a chat, whose turns stay whole"
            raise ConfigError("too_long", self.too_long, allowed, "remove it and ask for fewer shots, or raise seq_len")
