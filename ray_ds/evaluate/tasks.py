"""A task from its questions as tokens to its scores: what the model says, and what that amounts to.

read_questions ─ask_task→ AskedTask ─plan_work→ batches ─run_batch→ results ─judge→ outcomes ─score_task→ scores
"""

from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from ray_ds.config.tasks import TaskSettings
from ray_ds.evaluate.asking import AskedTask
from ray_ds.evaluate.bleu import bleu_counts, bleu_signature
from ray_ds.evaluate.continuations import Key, Likelihood, Row, cut_batches, plan_rows, score_rows
from ray_ds.evaluate.generation import Answer, Prompt, batch_prompts, write_answers
from ray_ds.evaluate.intervals import bootstrap, wilson
from ray_ds.evaluate.metrics import PROPORTIONS, guessing_accuracy, make_metric, matches
from ray_ds.evaluate.outcomes import Outcome
from ray_ds.evaluate.questions import Question
from ray_ds.model.decoder import Decoder
from ray_ds.tokenizer import BpeTokenizer

Batch = Sequence[Row] | Sequence[Prompt]
"""What goes through the model at once."""
Result = Likelihood | Answer


def plan_work(tasks: Sequence[AskedTask], micro_batch: int, vocab_size: int) -> list[Batch]:
    """Cut all questions into batches, the longest first; rows are shared also between tasks."""
    continuations = {key: own for task in tasks for key, own in task.continuations.items()}
    batches: list[Batch] = list(cut_batches(plan_rows(continuations), micro_batch, vocab_size))
    for task in tasks:
        batches += batch_prompts(task.prompts, micro_batch)
    return batches


def run_batch(decoder: Decoder, tokenizer: BpeTokenizer, batch: Batch, device: str = "cpu") -> dict[Key, Result]:
    """Return what the model says to a batch."""
    rows = [own for own in batch if isinstance(own, Row)]
    prompts = [own for own in batch if isinstance(own, Prompt)]
    found: dict[Key, Result] = dict(score_rows(decoder, rows, device)) if rows else {}
    return found | (write_answers(decoder, tokenizer, prompts, device) if prompts else {})


def judge(number: int, task: AskedTask, results: Mapping[Key, Result]) -> list[Outcome]:
    """Return what came of each question."""
    outcomes: list[Outcome] = []
    for i, question in enumerate(task.questions):
        if task.settings.generate is not None:
            answer = results[number, i]
            assert isinstance(answer, Answer)
            outcomes.append(_judge_answer(task.settings, question, answer, is_cut=i in task.cut))
        else:
            keys = [(number, i, choice) for choice in range(len(question.choices))]
            own = [(task.continuations[key], results[key]) for key in keys]
            nats = [result.nats for _, result in own if isinstance(result, Likelihood)]
            lengths = [len(continuation.tokens) - continuation.start for continuation, _ in own]
            outcomes.append(_judge_choice(task.settings, question, nats, lengths, is_cut=i in task.cut))
    return outcomes


def _judge_choice(
    task: TaskSettings, question: Question, nats: Sequence[float], num_tokens: Sequence[int], *, is_cut: bool
) -> Outcome:
    """Return the outcome of a question with choices; of equally likely ones the first is chosen."""
    settings = task.choose or task.classify
    assert settings is not None and question.right is not None
    lengths: dict[str, Sequence[int]] = {
        "none": [1] * len(nats),
        "tokens": num_tokens,
        "bytes": [len(choice.encode()) for choice in question.choices],
    }
    scores = [own / length for own, length in zip(nats, lengths[settings.length_normalisation], strict=True)]
    chosen = scores.index(max(scores))
    return Outcome(
        task=task.name,
        item=question.name,
        asked=question.sha256,
        right=question.answer,
        answer=question.choices[chosen],
        is_right=chosen == question.right,
        is_cut=is_cut,
        nats=tuple(nats),
    )


def _judge_answer(task: TaskSettings, question: Question, answer: Answer, *, is_cut: bool) -> Outcome:
    """Return the outcome of a question that the model wrote an answer to."""
    settings = task.generate
    assert settings is not None
    text = answer.text.removeprefix(task.joiner or "")
    is_right, counts = None, tuple[float, ...]()
    if "exact_match" in settings.metrics:
        is_right = matches(text, question.references, extract=settings.extract, normalise=settings.normalise or ())
    if "bleu" in settings.metrics:
        counts = bleu_counts(text, question.references, str(settings.bleu_tokenizer))
    return Outcome(
        task=task.name,
        item=question.name,
        asked=question.sha256,
        right=question.answer,
        answer=text,
        is_right=is_right,
        is_cut=is_cut,
        is_finished=answer.is_stopped,
        counts=counts,
    )


def score_task(task: AskedTask, outcomes: Sequence[Outcome]) -> dict[str, JsonValue]:
    """Return what a report says of a task."""
    settings = task.settings
    facts: dict[str, JsonValue] = {
        "items": len(outcomes),
        "shots": settings.shots,
        "chat": settings.chat,
        "cut": len(task.cut),
        "seed": settings.seed,
        "scores": {name: _score(name, how, outcomes, settings.seed) for name, how in _metrics(task).items()},
    }
    if settings.generate is not None:
        return facts | {"unfinished": sum(not own.is_finished for own in outcomes)}
    right = [own.right for own in outcomes]
    num_choices = [len(question.choices) for question in task.questions]
    same_labels = settings.classify is not None
    return facts | {"guessing_accuracy": guessing_accuracy(right, num_choices, same_labels=same_labels)}


def _metrics(task: AskedTask) -> dict[str, str]:
    """Return the metrics of a task, and how each is computed."""
    settings = task.settings
    if settings.generate is not None:
        numbers = {len(question.references) for question in task.questions}
        how = {
            "exact_match": f"normalise {', '.join(settings.generate.normalise or ()) or 'nothing'}",
            "bleu": str(settings.generate.bleu_tokenizer),
        }
        if "bleu" in settings.generate.metrics:
            how["bleu"] = bleu_signature(how["bleu"], numbers.pop() if len(numbers) == 1 else -1)
        return {name: how[name] for name in settings.generate.metrics}
    choice = settings.choose or settings.classify
    assert choice is not None
    how_chosen = f"length normalisation {choice.length_normalisation}"
    return {"accuracy": how_chosen} | ({"macro_f1": how_chosen} if settings.classify is not None else {})


def _score(name: str, how: str, outcomes: Sequence[Outcome], seed: int) -> dict[str, JsonValue]:
    """Return a metric with its interval."""
    metric = make_metric(name, outcomes)
    score = float(metric.formula(metric.statistics[0].sum(axis=0)[None])[0])
    if name in PROPORTIONS:
        low, high = wilson(sum(own.is_right is True for own in outcomes), len(outcomes))
    else:
        low, high = bootstrap(metric, seed)
    interval = "wilson" if name in PROPORTIONS else "bootstrap"
    return {"score": score, "low": low, "high": high, "interval": interval, "how": how}
