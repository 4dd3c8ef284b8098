import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

import pytest
import ray

from ray_ds.artifacts import Checkpoint, TokenShards, open_artifact
from ray_ds.config.parallel import Parallel
from ray_ds.config.presets import PRESETS
from ray_ds.errors import ArtifactError, ClusterError, ConfigError, InputError, UserError
from ray_ds.plan.devices import Fleet, find_kind
from ray_ds.stage_run import StageRun
from ray_ds.stages import train as stage
from ray_ds.tokenizer import train_bpe
from ray_ds.train.checkpoints import find_latest
from ray_ds.train.goodput import ATTEMPTS, Attempt, write_attempts
from ray_ds.train.task import TrainResult, TrainTask
from tests.stages.small_artifacts import book_texts, stage_run
from tests.train.runs import VOCAB_SIZE, curve, make_settings, make_task, read_records, train_in_processes, write_shards

pytestmark = pytest.mark.usefixtures("local_ray")

SETTINGS: dict[str, Any] = {"steps": 40, "checkpoint_every": 5, "zero_stage": 1}


DONE = TrainResult(
    step=8,
    model_step=8,
    tokens=2048,
    train_loss=1.0,
    validation_loss=None,
    tokens_per_s=100.0,
    mfu=None,
    goodput=1.0,
    lost_s=0.0,
    restarts=0,
)


def make_shards(folder: Path) -> TokenShards:
    run = stage_run(folder, "TokenShards")
    if not Path(run.uri).exists():
        write_shards(Path(run.uri))
        tokenizer = train_bpe(book_texts(2, 2).values(), VOCAB_SIZE)
        (Path(run.uri) / "tokenizer.json").write_text(tokenizer.to_json())
        run.commit({"vocab_size": VOCAB_SIZE, "tokenizer_digest": "abc"}, seconds=0.0)
    return open_artifact(run.uri, [TokenShards])


def make_run(folder: Path) -> StageRun:
    return stage_run(folder, "Checkpoint", make_shards(folder))


def run_job(address: str, folder: str, **changes: Any) -> None:
    """Run the stage as a job would: in a process of its own that connects to the cluster."""
    ray.init(address=address)
    stage.train(make_settings(**{**SETTINGS, **changes}), make_run(Path(folder)))


def start_and_kill_job(address: str, folder: Path) -> None:
    """Run the job until its first checkpoint counts, then kill it."""
    run = make_run(folder)
    code = f"from tests.stages.test_train import run_job; run_job({address!r}, {str(folder)!r})"
    job = subprocess.Popen([sys.executable, "-c", code])
    while not list(Path(run.work_path("checkpoints")).glob("*/COMMITTED.json")):
        assert job.poll() is None, "the job ended before its first checkpoint"
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not Path(run.path("manifest.json")).exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.shows("A training job that was killed goes on from its last checkpoint when it is submitted again")
def test_killed_job_goes_on_when_submitted_again(local_ray: str, tmp_path: Path) -> None:
    start_and_kill_job(local_ray, tmp_path)
    run = make_run(tmp_path)
    artifact = stage.train(make_settings(**SETTINGS), run)
    whole = make_task(tmp_path, make_settings(**SETTINGS), "whole")
    train_in_processes(whole)
    assert curve(read_records(whole)) == curve(read_records(make_task(tmp_path, make_settings(), run.uri)))
    check_artifact(artifact, run)


def check_artifact(artifact: Any, run: StageRun) -> None:
    assert isinstance(artifact, Checkpoint)
    names = {info.path for info in artifact.manifest.files}
    assert {
        "metrics.jsonl",
        "curve.png",
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
    } <= names
    facts = dict(artifact.manifest.facts)
    assert facts["step"] == facts["model_step"] == 40 and facts["tokens"] == 40 * 256 and facts["world_size"] == 2
    assert (facts["tokenizer_digest"], facts["zero_stage"], facts["precision"]) == ("abc", 1, "fp32")
    assert 0 < facts["train_loss"] < 6 and facts["tokens_per_s"] > 0 and facts["parameters"] > 10_000
    assert not list(Path(run.work_path()).iterdir())


@pytest.mark.ray
@pytest.mark.shows("Stack traces of workers that hung, which the log names, are there after training is finished")
def test_what_is_still_needed_of_a_finished_run_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    needed = {"hangs/20261124T120000Z-rank-1.txt", "lease.json"}

    def train_on_ray(task: TrainTask, *, work: str, **_: Any) -> TrainResult:
        done = {"checkpoints/step-00000005/COMMITTED.json", "ray_train/attempt/state.json", "metrics.jsonl"}
        for path in (Path(work) / name for name in needed | done):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return DONE

    monkeypatch.setattr(stage, "train_on_ray", train_on_ray)
    artifact = stage.train(make_settings(), run)
    work = Path(run.work_path())
    assert {str(path.relative_to(work)) for path in work.rglob("*") if path.is_file()} == needed
    assert not artifact.manifest.files and artifact.fact("model_step") == 8


def refused(kind: type[UserError], folder: Path, **changes: Any) -> str:
    """Return the message of a stage that refuses before it starts a worker."""
    with pytest.raises(kind) as error:
        stage.train(make_settings(**changes), make_run(folder))
    return str(error.value)


@pytest.mark.ray
def test_more_workers_than_the_cluster_holds(tmp_path: Path) -> None:
    message = refused(ClusterError, tmp_path, num_workers=4)
    assert message.startswith("checkpoint.num_workers (4) must be at most 2, what the cluster's nodes hold at 1 CPU")


@pytest.mark.ray
@pytest.mark.shows("A training job that cannot fit its GPUs is refused before one is taken")
def test_a_micro_batch_that_no_gpu_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(kind=replace(find_kind("h100"), memory_bytes=3 << 30), num_devices=2)
    monkeypatch.setattr(stage, "known_gpu_fleet", lambda: fleet)
    task = make_task(tmp_path, make_settings(precision="bf16"))
    stage.check_memory(task, "pretrain")  # on CPUs nothing is refused
    small = replace(task, device="cuda")
    with pytest.raises(ConfigError, match=r"^pretrain\.model \(.* must fit the 3\.0 GiB of a h100"):
        stage.check_memory(replace(small, config=PRESETS["llama_1b"]), "pretrain")


@pytest.mark.parametrize(
    ("stage_number", "gib", "change"), [(0, 16, {"parallel": Parallel(tensor=2)}), (1, 9, {"offload": "optimizer"})]
)
def test_groups_and_offload_count_in_what_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage_number: int, gib: int, change: dict[str, Any]
) -> None:
    fleet = Fleet(kind=replace(find_kind("h100"), memory_bytes=gib << 30), num_devices=2)
    monkeypatch.setattr(stage, "known_gpu_fleet", lambda: fleet)
    dense = {"preset": "tiny", "n_routed_experts": 0}
    plain = make_settings(model=dense, precision="bf16", zero_stage=stage_number)
    task = replace(make_task(tmp_path, plain), device="cuda", config=PRESETS["llama_1b"])
    with pytest.raises(ConfigError, match=f"fits? the {gib}.0 GiB of a h100"):
        stage.check_memory(task, "pretrain")
    stage.check_memory(replace(task, settings=replace(plain, **change)), "pretrain")


@pytest.mark.ray
def test_fp16_on_a_cpu_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "cpu_has_fp16", lambda: False)
    assert refused(ConfigError, tmp_path, precision="fp16") == (
        "checkpoint.precision (fp16) must be bf16 or fp32 on this CPU, which has no fp16 arithmetic; use bf16, or a "
        "cluster with GPUs."
    )


@pytest.mark.ray
def test_too_little_text_for_a_row(tmp_path: Path) -> None:
    message = refused(InputError, tmp_path, seq_len=2048, batch_tokens=4 * 2 * 2048)
    assert "must have a shard of at least seq_len + 1 = 2049 tokens" in message


@pytest.mark.ray
def test_shards_with_a_flipped_bit(tmp_path: Path) -> None:
    shard = Path(make_shards(tmp_path).path("train", "1.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    message = refused(ArtifactError, tmp_path)
    assert message.startswith(f"{shard} (sha256 ") and "as its manifest says" in message


LONGER: dict[str, Any] = {**SETTINGS, "steps": 60}


def run_and_kill(address: str, folder: Path, actor: str) -> int:
    """Run the job, kill an actor of its after a checkpoint more than there is, and return the job's exit status."""
    run = make_run(folder)
    before = newest_step(run)
    code = (
        "import sys; from ray_ds.job import exit_status; from tests.stages.test_train import LONGER, run_job; "
        f"sys.exit(exit_status(lambda: run_job({address!r}, {str(folder)!r}, **LONGER) or 0))"
    )
    others = living_actors(actor)
    job = subprocess.Popen([sys.executable, "-c", code])
    pids: set[int] = set()
    while not pids or newest_step(run) == before:
        assert job.poll() is None, "the job ended before its next checkpoint"
        pids = pids or living_actors(actor) - others
        time.sleep(0.02)
    (pid,) = pids
    os.kill(pid, signal.SIGKILL)
    return job.wait()


def living_actors(class_name: str) -> set[int]:
    """Return the processes of a class's living actors."""
    actors = [one for one in ray._private.state.actors().values() if one["State"] == "ALIVE"]
    return {one["Pid"] for one in actors if one["ActorClassName"] == class_name}


def newest_step(run: StageRun) -> int:
    """Return the step of a run's newest checkpoint; 0 without one."""
    found = Path(run.work_path("checkpoints")).glob("*/COMMITTED.json")
    return max((int(path.parent.name.removeprefix("step-")) for path in found), default=0)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.shows(
    "A training job whose controller or notice board is killed exits with 75, and goes on when it is submitted again"
)
def test_job_that_loses_its_controller_is_retryable_and_goes_on(local_ray: str, tmp_path: Path) -> None:
    assert [run_and_kill(local_ray, tmp_path, actor) for actor in ("SparedController", "Board")] == [75, 75]
    run = make_run(tmp_path)
    assert newest_step(run) >= 10, "each job has left a checkpoint"
    stage.train(make_settings(**LONGER), run)
    whole = make_task(tmp_path, make_settings(**LONGER), "whole")
    train_in_processes(whole)
    assert curve(read_records(whole)) == curve(read_records(make_task(tmp_path, make_settings(), run.uri)))


@pytest.mark.ray
@pytest.mark.slow
def test_checkpoints_that_cannot_be_used(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    task = make_task(tmp_path, make_settings(steps=4))
    task = type(task)(**{**vars(task), "checkpoints": run.work_path("checkpoints")})
    train_in_processes(task)
    for weights in Path(task.checkpoints).rglob("rank-00000.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1])
    message = refused(ArtifactError, tmp_path)
    assert "bytes instead of" in message and f"delete {task.checkpoints}" in message


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.shows("A training job that is told to stop leaves a checkpoint of its last step")
def test_job_that_is_told_to_stop_leaves_a_checkpoint_of_its_last_step(local_ray: str, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    code = (
        f"from tests.stages.test_train import run_job; run_job({local_ray!r}, {str(tmp_path)!r}, checkpoint_every=1000)"
    )
    job = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    metrics = Path(run.work_path("metrics.jsonl"))
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert job.poll() is None, "the job ended before its third step"
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate()
    commit = find_latest(run.work_path("checkpoints"))
    assert commit is not None and commit.step == metrics.read_text().count("\n") < 40
    assert f"TrainingStopped: training was told to stop and did, after step {commit.step}, which is safe" in errors
    stage.train(make_settings(**SETTINGS), run)
    whole = make_task(tmp_path, make_settings(**SETTINGS), "whole")
    train_in_processes(whole)
    assert curve(read_records(whole)) == curve(read_records(make_task(tmp_path, make_settings(), run.uri)))


def begin(run: StageRun, device: str) -> None:
    """Leave behind what a group of workers does that began to train."""
    attempt = Attempt(began=1.0, idle_s=0.0, step=0, world_size=8, device=device)
    write_attempts(run.work_path(stage.CHECKPOINTS, ATTEMPTS), [attempt])


@pytest.mark.shows("A run whose nodes were lost goes on where they come back: it is not refused, nor moved to CPUs")
def test_a_run_that_has_begun_waits_for_its_lost_nodes(tmp_path: Path) -> None:
    settings = make_settings(num_workers=64, device="auto", batch_tokens=64 * 64)
    run = make_run(tmp_path)
    with pytest.raises(ClusterError, match=r"num_workers \(64\) must be at most"):
        stage.check_task(stage.make_task(settings, run.input(TokenShards), run), run)
    begin(run, "cuda")
    task = stage.make_task(settings, run.input(TokenShards), run)
    assert task.device == "cuda"
    stage.check_task(task, run)


def test_cpus_are_not_taken_where_an_autoscaler_may_start_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "nodes_may_come", lambda: True)
    with pytest.raises(
        ConfigError, match=r"^train.device \(auto\) must be cuda or cpu where .*; add --train.device=cuda"
    ):
        stage.choose_device(make_settings(device="auto"), "train", had=None)
    assert stage.choose_device(make_settings(device="cuda"), "train", had=None) == "cuda"
    assert stage.choose_device(make_settings(device="cpu"), "train", had="cuda") == "cpu"
    assert stage.choose_device(make_settings(device="auto"), "train", had="cpu") == "cpu"
