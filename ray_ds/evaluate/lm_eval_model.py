"""A Checkpoint or QuantizedModel as a model of lm-evaluation-harness, an optional package, for its tasks and yours.

    model = open_for_lm_eval("/runs/demo/pretrain/0123456789abcdef")
    lm_eval.simple_evaluate(model=model, tasks=["mine"], task_manager=TaskManager(include_path="/sets/tasks"))

With `apply_chat_template=True` questions are asked in the turns of the model's own chat template. Prompts that are too
long lose their beginning, as with the harness's own models, but keep BOS; `num_cut` counts them.
"""

import importlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ray_ds.artifacts import Artifact, Checkpoint, QuantizedModel, open_artifact
from ray_ds.chat.encoding import ChatEncoder
from ray_ds.chat.template import Message
from ray_ds.errors import ConfigError, InputError
from ray_ds.evaluate.continuations import (
    Continuation,
    Key,
    Likelihood,
    cut_batches,
    cut_left,
    encode_choices,
    plan_rows,
)
from ray_ds.evaluate.generation import Answer, Prompt, batch_prompts, fit_prompt
from ray_ds.evaluate.lm_eval_chats import LmEvalChats
from ray_ds.evaluate.models import load_model, open_chat
from ray_ds.evaluate.tasks import Batch, Result, run_batch
from ray_ds.model.local_folder import MODEL_FOLDER
from ray_ds.tokenizer import BpeTokenizer, load_tokenizer

DEFAULT_NEW_TOKENS = 256
"""Where a task does not say how long an answer may be; as the harness's own models."""
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens")
_KNOWN = {"until", "do_sample", "temperature", *_LENGTH_NAMES}


def open_for_lm_eval(
    uri: str, *, device: str = "cpu", precision: Literal["fp32", "bf16"] = "bf16", micro_batch: int = 8
) -> Any:
    """Return the model of a finished artefact as an `lm_eval.api.model.LM`.

    Raises:
        ArtifactError: there is no finished Checkpoint or QuantizedModel.
        ConfigError: lm_eval is not installed.
    """
    check_lm_eval("model")
    kinds: list[type[Artifact]] = [Checkpoint, QuantizedModel]
    artifact = open_artifact(uri.rstrip("/"), kinds)
    with tempfile.TemporaryDirectory() as cache:
        decoder = load_model(artifact, precision, device, Path(cache))
    tokenizer = load_tokenizer(artifact.path(MODEL_FOLDER, "tokenizer.json"))

    def run_batches(batches: Sequence[Batch]) -> dict[Key, Result]:
        return {key: own for batch in batches for key, own in run_batch(decoder, tokenizer, batch, device).items()}

    seq_len = decoder.config.max_position_embeddings
    encoder = open_chat(artifact, tokenizer)
    return as_lm_eval_model(
        LmEvalAnswers(run_batches, tokenizer, seq_len=seq_len, micro_batch=micro_batch, encoder=encoder)
    )


def check_lm_eval(field: str) -> None:
    """Refuse lm_eval where it is not installed.

    Raises:
        ConfigError: it is not.
    """
    lm_eval_module("api.model", field)


class LmEvalAnswers:
    """What the harness asks of a model, in its words; `requests` hold the arguments of each request."""

    def __init__(
        self,
        run_batches: Callable[[Sequence[Batch]], Mapping[Key, Result]],
        tokenizer: BpeTokenizer,
        *,
        seq_len: int,
        micro_batch: int,
        encoder: ChatEncoder | None = None,
    ) -> None:
        """Answer by a model that sees `seq_len` tokens.

        Args:
            run_batches: returns what the model says to batches, each of `micro_batch` rows or prompts at most.
            encoder: how the model reads messages, if it has a chat template.
        """
        self.chats = LmEvalChats(encoder, tokenizer) if encoder is not None else None
        self.num_cut = 0
        """Prompts that lost their beginning so far."""
        self._run_batches = run_batches
        self._tokenizer = tokenizer
        self._micro_batch = micro_batch
        self._seq_len = seq_len

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) its log-probability, and whether greedy decoding would write it.

        As with the harness's own models, white space at a context's end is judged with the continuation; but a chat's
        answer is encoded apart from the words that ask for it, as it is learnt.
        """
        asked: dict[Key, Continuation] = {}
        for i, (context, continuation) in enumerate(requests):
            opening, text = self._opening(context)
            stripped = text.rstrip()
            encoded = encode_choices(self._tokenizer, stripped, [text[len(stripped) :] + continuation], opening)
            fitting = cut_left(encoded, self._seq_len, self._tokenizer.bos_id)
            if fitting is None:
                raise _too_long(continuation, self._seq_len)
            self.num_cut += fitting != encoded
            asked[i,] = fitting[0]
        found = self._score(asked)
        return [(found[i,].nats, found[i,].is_greedy) for i in range(len(requests))]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Return each text's log-probability after BOS; a long one is predicted in windows, each token once."""
        windows: dict[Key, Continuation] = {}
        for i, text in enumerate(texts):
            for j, (context, predicted) in enumerate(self._windows(text)):
                windows[i, j] = Continuation(tokens=(*context, *predicted), start=len(context))
        found = self._score(windows)
        sums = [0.0] * len(texts)
        for key in sorted(found):
            sums[key[0]] += found[key].nats
        return sums

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Return the answer to each (context, generation_kwargs)."""
        prompts: list[Prompt] = []
        for i, (context, options) in enumerate(requests):
            length = int(next((options[name] for name in _LENGTH_NAMES if name in options), DEFAULT_NEW_TOKENS))
            opening, text = self._opening(context)
            tokens = (*opening, *(self._tokenizer.encode(text) if opening else self._tokenizer.encode_prompt(text)))
            fitting = fit_prompt(tokens, length, self._seq_len, self._tokenizer.bos_id)
            if fitting is None:
                raise _too_long(f"max_gen_toks {length}", self._seq_len)
            self.num_cut += fitting != tokens
            until = options.get("until") or ()
            prompts.append(
                Prompt(
                    key=(i,),
                    tokens=fitting,
                    max_new_tokens=length,
                    stop=(until,) if isinstance(until, str) else tuple(until),
                    temperature=_temperature(options),
                    seed=f"{i} {context}",
                )
            )
        found = self._run_batches(list(batch_prompts(prompts, self._micro_batch)))
        return [answer.text for i in range(len(requests)) if isinstance(answer := found[i,], Answer)]

    def _opening(self, context: str) -> tuple[tuple[int, ...], str]:
        """Return the tokens that a context begins with, if it is a chat, and the text behind them."""
        return ((), context) if self.chats is None else self.chats.opening(context)

    def _score(self, asked: Mapping[Key, Continuation]) -> dict[Key, Likelihood]:
        found = self._run_batches(list(cut_batches(plan_rows(asked), self._micro_batch, self._tokenizer.vocab_size)))
        return {key: own for key, own in found.items() if isinstance(own, Likelihood)}

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (context, predicted) of the harness's rolling windows."""
        utils = lm_eval_module("utils")
        tokens = self._tokenizer.encode(text)
        for pair in utils.get_rolling_token_windows(tokens, self._tokenizer.bos_id, self._seq_len, context_len=1):
            yield utils.make_disjoint_window(pair)


def as_lm_eval_model(answers: LmEvalAnswers) -> Any:
    """Return an instance of the harness's `LM`, which it asks for by type."""
    base = lm_eval_module("api.model").LM

    class RayDsModel(base):  # type: ignore[misc, valid-type]
        """Hands the harness's requests over; results go to its cache, where it has one."""

        @property
        def num_cut(self) -> int:
            """Return how many prompts lost their beginning so far."""
            return answers.num_cut

        @property
        def tokenizer_name(self) -> str:
            """Return what the harness tells cached requests apart by."""
            return "ray_ds"

        def chat_template(self, chat_template: bool | str = False) -> str:
            """Return the template that `apply_chat_template` uses, for the harness's records."""
            return answers.chats.template if answers.chats is not None else ""

        def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
            """Return messages as text."""
            if answers.chats is None:
                action = "evaluate a model that was trained on shards of tokenize_chat, or leave it out"
                raise ConfigError("apply_chat_template", True, "needs a model with a chat template", action)
            return answers.chats.render(chat_history, add_generation_prompt=add_generation_prompt)

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """Answer `loglikelihood` requests."""
            return self._keep("loglikelihood", requests, answers.loglikelihood([own.args for own in requests]))

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            """Answer `loglikelihood_rolling` requests."""
            found = answers.loglikelihood_rolling([own.args[0] for own in requests])
            return self._keep("loglikelihood_rolling", requests, found)

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """Answer `generate_until` requests."""
            return self._keep("generate_until", requests, answers.generate_until([own.args for own in requests]))

        def _keep(self, kind: str, requests: Sequence[Any], found: list[Any]) -> list[Any]:
            for request, result in zip(requests, found, strict=True):
                self.cache_hook.add_partial(kind, request.args, result)
            return found

    return RayDsModel()


def _temperature(options: Mapping[str, Any]) -> float:
    """Return what the harness's generation_kwargs ask for: 0 unless they say do_sample.

    Raises:
        ConfigError: they ask for something that sampling here does not know.
    """
    if not options.get("do_sample", False):
        return 0.0
    for name, value in options.items():
        if name not in _KNOWN:
            allowed = f"must be one of {', '.join(sorted(_KNOWN))}"
            raise ConfigError(f"generation_kwargs.{name}", value, allowed, "remove it from the task")
    return float(options.get("temperature", 1.0))


def _too_long(text: str, seq_len: int) -> InputError:
    shown = text if len(text) <= 80 else f"{text[:80]}..."
    return InputError("answer", shown, f"must fit into the {seq_len} tokens that the model sees", "use a shorter one")


def lm_eval_module(module: str, field: str = "lm_eval") -> Any:
    """Return a module of lm_eval, which is not imported before it is asked for.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(f"lm_eval.{module}")
    except ImportError as error:
        allowed = "needs the package lm_eval, which is not installed here"
        raise ConfigError(field, "lm_eval", allowed, "pip install 'ray_ds[lm-eval]'") from error
