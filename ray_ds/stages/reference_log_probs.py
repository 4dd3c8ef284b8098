"""The reference_log_probs stage: Checkpoint + TokenShards of pairs -> ReferenceLogProbs, on Ray Data.

A DPO step that names the result as its `reference` needs no second model beside its own.
"""

from ray_ds.artifacts import Artifact, Checkpoint, TokenShards
from ray_ds.config.reference_log_probs import ReferenceLogProbsSettings
from ray_ds.errors import ArtifactError
from ray_ds.on_ray.row_files import choose_device, store_rows
from ray_ds.stage_run import StageRun
from ray_ds.train.ask_rows import RowJob
from ray_ds.train.inputs import read_model, row_kind
from ray_ds.train.reference import ask_reference

BYTES_PER_TOKEN = 4


def store_reference_log_probs(settings: ReferenceLogProbsSettings, run: StageRun) -> Artifact:
    """Store the log-probability that the model gives each target of every row of both splits.

    Raises:
        ArtifactError: an input is damaged, the model has another tokenizer than the shards, or these hold no pairs.
        ConfigError: rows are longer than the model takes.
    """
    job = make_job(settings, run.input(Checkpoint), run.input(TokenShards), run.step)
    return store_rows(job, run, {}, max_running=settings.max_running_units, bytes_per_token=BYTES_PER_TOKEN)


def make_job(settings: ReferenceLogProbsSettings, reference: Checkpoint, shards: TokenShards, step: str) -> RowJob:
    """Return what the tasks are told.

    Raises:
        ArtifactError: the model does not go with the shards, or these hold no pairs.
        ConfigError: rows are longer than the model takes.
    """
    read_model(reference, shards, seq_len=settings.seq_len, step=step)
    kind = row_kind(shards)
    if kind != "preference":
        allowed = "must be shards of pairs of answers, which DPO compares"
        raise ArtifactError(shards.uri, f"{kind} shards", allowed, "name other shards in `from`")
    return RowJob(
        settings=settings,
        ask=ask_reference,
        checkpoint=reference.uri,
        shards=shards.uri,
        rows=kind,
        device=choose_device(settings.device),
    )
