"""What a training worker is told, and what it gives back."""

from typing import Any

from pydantic import JsonValue

from ray_ds.config.model import ModelConfig
from ray_ds.config.settings import as_json, decode_settings, settings
from ray_ds.config.train import TrainSettings
from ray_ds.data.rows import RowKind


@settings
class TrainTask:
    """One training run, the same for all its workers; it reaches them as one dict."""

    settings: TrainSettings
    """How to train."""
    config: ModelConfig
    """What to train."""
    shards: str
    """Folder of the TokenShards."""
    rows: RowKind = "stream"
    """How the documents of the shards become rows."""
    init_from: str | None = None
    """Folder of the Checkpoint whose weights training starts from; absent = random ones."""
    teacher: str | None = None
    """Folder of the Checkpoint that is distilled."""
    teacher_logits: str | None = None
    """Folder of the TeacherLogits that are distilled instead."""
    reference_log_probs: str | None = None
    """Folder of the ReferenceLogProbs that DPO measures by; absent = it asks the model of `init_from` again."""
    checkpoints: str
    """Folder that unfinished training goes on from."""
    output: str
    """Folder that gets `model/`, `metrics.jsonl` and `curve.png`."""
    bos_token_id: int
    """Starts every document."""
    eos_token_id: int
    """Ends a text that is generated."""
    device: str
    """`cpu` or `cuda`."""
    job_started: float = 0.0
    """When the job was submitted, in Unix seconds: time without a job counts as lost for nobody."""

    def settings_json(self) -> dict[str, JsonValue]:
        """Return the settings as JSON values."""
        encoded = as_json(self.settings)
        assert isinstance(encoded, dict)
        return encoded

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        encoded = as_json(self)
        assert isinstance(encoded, dict)
        return encoded

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "TrainTask":
        """Return what `to_dict` encoded."""
        return decode_settings(cls, raw, where="task")


@settings
class TrainResult:
    """What a finished run has to say; the facts of its checkpoint."""

    step: int
    """Optimizer steps."""
    model_step: int
    """The step whose model the run leaves: the last, or the best with `keep_best`."""
    tokens: int
    """Tokens trained on."""
    train_loss: float
    """Mean of the last steps' losses, in nats a token."""
    validation_loss: float | None
    """The last look at the validation split up to `model_step`, in nats a token."""
    tokens_per_s: float
    """Median over the steps, of all workers together."""
    mfu: float | None
    """Median part of the device's peak that the model's own work was; None where the peak is unknown."""
    goodput: float
    """Part of the run's time that was spent on steps that count."""
    lost_s: float
    """Seconds lost to restarts."""
    restarts: int
    """Times that the workers were started anew."""


@settings
class Stopped:
    """What a run has to say that was asked to end before its last step."""

    step: int
    """Optimizer steps whose state is safe."""
