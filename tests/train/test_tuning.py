"""Fine-tuning end to end in processes: every objective, killed and resumed at other numbers of workers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.spawn import ProcessExitedException

from ray_ds.artifacts import ReferenceLogProbs, TeacherLogits, find_artifact
from ray_ds.model.checkpoint_folder import load_checkpoint_folder
from ray_ds.train.checkpoints import find_latest
from ray_ds.train.host import Request
from ray_ds.train.task import TrainTask
from tests.stages.small_artifacts import stage_run
from tests.train.chats import new_checkpoint, tuned_settings, tuning_task, write_chats
from tests.train.runs import VOCAB_SIZE, curve, read_records, train_in_processes
from tests.train.teachers import finish_shards, store_logits, store_reference

pytestmark = pytest.mark.slow

LORA = {"rank": 4, "alpha": 8.0}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft": ("chat", {"zero_stage": 2}),
    "sft-lora": ("chat", {"zero_stage": 2, "lora": LORA}),
    "sft-lora-zero3": ("chat", {"zero_stage": 3, "lora": {"rank": 8, "alpha": 16.0, "routed_experts": True}}),
    "sft-lora-zero0": ("chat", {"zero_stage": 0, "lora": LORA}),
    "dpo": ("preference", {"zero_stage": 1, "objective": {"kind": "dpo", "beta": 1.0}}),
    "dpo-zero3": ("preference", {"zero_stage": 3, "objective": {"kind": "dpo"}, "lora": LORA}),
    "dpo-stored": ("preference", {"zero_stage": 2, "objective": {"kind": "dpo", "beta": 1.0}}),
    "distill": ("chat", {"zero_stage": 2, "objective": {"kind": "distill", "temperature": 2.0}}),
    "distill-stored": ("chat", {"zero_stage": 3, "objective": {"kind": "distill", "temperature": 2.0}}),
}


def make_task(folder: Path, case: str, name: str, **changes: Any) -> TrainTask:
    kind, settings = CASES[case]
    settings = tuned_settings(**{"steps": 9, "num_workers": [1, 3], "validate_every": 4, **settings, **changes})
    asked: dict[str, Any] = {}
    if case == "distill":
        asked = {"teacher": new_checkpoint(folder / "teacher", seed=6)}
    if case == "distill-stored":
        asked = {"teacher_logits": stored_logits(folder, temperature=2.0).uri}
    if case == "dpo-stored":
        asked = {"reference_log_probs": stored_reference(folder).uri}
    return tuning_task(folder, settings, kind, f"{case}-{name}", **asked)


def stored_reference(folder: Path) -> ReferenceLogProbs:
    """Return what the first model says to the pairs in `folder`, asked once."""
    found = find_artifact(stage_run(folder, "ReferenceLogProbs").uri)
    if isinstance(found, ReferenceLogProbs):
        return found
    write_chats(folder / "preference", "preference")
    shards = finish_shards(folder / "preference", "preference")
    return store_reference(folder, new_checkpoint(folder / "start"), shards)


def stored_logits(folder: Path, **changes: Any) -> TeacherLogits:
    """Return what a teacher says to the chats in `folder`, asked once."""
    found = find_artifact(stage_run(folder, "TeacherLogits").uri)
    if isinstance(found, TeacherLogits):
        return found
    write_chats(folder / "chat", "chat")
    return store_logits(
        folder, new_checkpoint(folder / "teacher", seed=6), finish_shards(folder / "chat", "chat"), **changes
    )


@pytest.mark.shows("Fine-tuning of any kind, stopped and resumed with other workers, has an undisturbed run's losses")
@pytest.mark.parametrize("case", CASES)
def test_stopped_tuning_goes_on_with_other_workers(tmp_path: Path, case: str) -> None:
    whole, stopped = make_task(tmp_path, case, "whole"), make_task(tmp_path, case, "stopped")
    train_in_processes(whole, world_size=1)
    train_in_processes(stopped, world_size=3, requests={5: Request.STOP})
    commit = find_latest(stopped.checkpoints)
    assert commit is not None and (commit.step, commit.extra["cursor"]) == (5, 5)
    train_in_processes(stopped, world_size=2)
    expected, records = read_records(whole), read_records(stopped)
    for figure in ("loss", "terms", "grad_norm", "reward_margin", "kl", "cross_entropy"):
        found = [[record.get(figure) for record in each] for each in (records, expected)]
        if found[0][0] is not None:
            torch.testing.assert_close(found[0], found[1], rtol=2e-4, atol=1e-6)
    assert records[-1]["loss"] < records[0]["loss"]
    assert (Path(stopped.output) / "model" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_killed_tuning_resumes_bitwise(tmp_path: Path) -> None:
    whole, killed = make_task(tmp_path, "sft-lora", "whole"), make_task(tmp_path, "sft-lora", "killed")
    train_in_processes(whole, world_size=2)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        train_in_processes(killed, world_size=2, die_at_step=5)
    train_in_processes(killed, world_size=2)
    assert curve(read_records(killed)) == curve(read_records(whole))
    weights = "model/model.safetensors"
    assert (Path(killed.output) / weights).read_bytes() == (Path(whole.output) / weights).read_bytes()


def test_adapter_is_kept_beside_the_merged_model(tmp_path: Path) -> None:
    task = make_task(tmp_path, "sft-lora", "run")
    train_in_processes(task, world_size=1)
    assert task.init_from is not None
    before = load_checkpoint_folder(Path(task.init_from) / "model", dtype=torch.float32, device="cpu").state_dict()
    after = load_checkpoint_folder(Path(task.output) / "model", dtype=torch.float32, device="cpu").state_dict()
    adapter = load_file(Path(task.output) / "adapter" / "adapter_model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    adapted = {name.removeprefix(prefix).removesuffix(suffix) for name in adapter if name.endswith(suffix)}
    assert changed == {f"{name}.weight" for name in adapted} and len(adapted) > 8
    for name in adapted:
        product = adapter[f"{prefix}{name}.lora_B.weight"] @ adapter[f"{prefix}{name}.lora_A.weight"] * 2.0
        torch.testing.assert_close(after[f"{name}.weight"] - before[f"{name}.weight"], product, rtol=1e-4, atol=1e-6)


def test_dpo_starts_at_a_margin_of_zero_and_widens_it(tmp_path: Path) -> None:
    task = make_task(tmp_path, "dpo", "run", steps=12)
    train_in_processes(task, world_size=1)
    records = read_records(task)
    assert records[0]["reward_margin"] == 0 and abs(records[0]["loss"] - 0.6931472) < 1e-6
    assert records[-1]["reward_margin"] > 0.5 and records[-1]["reward_accuracy"] > 0.9
    assert records[-1]["validation_loss"] < 0.6


def test_a_stored_reference_trains_as_the_one_in_memory(tmp_path: Path) -> None:
    settings = tuned_settings(steps=8, validate_every=4, num_workers=2, objective={"kind": "dpo", "beta": 1.0})
    asked: list[dict[str, str]] = [{"reference_log_probs": stored_reference(tmp_path).uri}, {}]
    tasks = [tuning_task(tmp_path, settings, "preference", f"run-{len(each)}", **each) for each in asked]
    for task in tasks:
        train_in_processes(task)
    names = ("loss", "grad_norm", "reward_margin", "reward_chosen", "reward_rejected", "validation_loss")
    from_store, live = ([[r.get(name, 0.0) for name in names] for r in read_records(task)] for task in tasks)
    torch.testing.assert_close(torch.tensor(from_store), torch.tensor(live), rtol=1e-5, atol=1e-5)
    assert live[-1][2] > 0.3


def test_all_logits_stored_train_as_the_teacher_does(tmp_path: Path) -> None:
    objective = {"kind": "distill", "temperature": 2.0}
    settings = tuned_settings(steps=6, validate_every=3, num_workers=2, objective=objective)
    stored = stored_logits(tmp_path, temperature=2.0, top_k=VOCAB_SIZE)
    asked: list[dict[str, str]] = [{"teacher": new_checkpoint(tmp_path / "teacher")}, {"teacher_logits": stored.uri}]
    tasks = [tuning_task(tmp_path, settings, "chat", next(iter(each)), **each) for each in asked]
    for task in tasks:
        train_in_processes(task)
    live, from_store = ([(r["loss"], r["kl"], r.get("validation_loss", 0.0)) for r in read_records(t)] for t in tasks)
    torch.testing.assert_close(torch.tensor(from_store), torch.tensor(live), rtol=1e-3, atol=1e-5)
    assert live[0][1] > 0.003


def test_a_teacher_that_is_the_student_has_nothing_to_say(tmp_path: Path) -> None:
    settings = tuned_settings(steps=3, objective={"kind": "distill", "cross_entropy_weight": 0.0}, num_workers=1)
    start = new_checkpoint(tmp_path / "start")
    task = tuning_task(tmp_path, settings, "chat", "same", teacher=start)
    train_in_processes(task)
    first = read_records(task)[0]
    assert first["kl"] == first["loss"] == first["grad_norm"] == 0 and first["cross_entropy"] > 1
