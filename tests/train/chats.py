"""Small shards of conversations and of pairs, and a checkpoint to start from, for tests."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_ds.config.settings import decode_settings
from ray_ds.config.train import TrainSettings
from ray_ds.data.rows import RowKind
from ray_ds.data.shard_file import write_shard
from ray_ds.model.checkpoint_folder import save_checkpoint_folder
from ray_ds.model.decoder import Decoder
from ray_ds.model.initial import init_weights
from ray_ds.train.task import TrainTask
from tests.train.runs import SMALL, VOCAB_SIZE, make_settings


def write_chats(folder: Path, kind: RowKind) -> None:
    """Write two shards a split: a prompt of some tokens, then an answer that counts up (a worse one: down)."""
    rng = np.random.default_rng(1)
    for split in ("train", "validation"):
        for shard in range(2):
            documents, masks = [], []
            for _ in range(40):
                prompt = [0, *rng.integers(3, VOCAB_SIZE, size=int(rng.integers(1, 4)))]
                sign_of = (1, -1) if kind == "preference" else (1,)
                length = int(rng.integers(1, 4))
                for sign in sign_of:
                    answer = 3 + (prompt[-1] - 3 + sign * np.arange(1, length + 1)) % (VOCAB_SIZE - 3)
                    documents.append(np.array([*prompt, *answer, 1], np.uint16))
                    masks.append(np.array([0] * len(prompt) + [1] * (length + 1), np.uint8))
            (folder / split).mkdir(parents=True, exist_ok=True)
            names = [str(number) for number in range(len(documents))]
            write_shard(str(folder / split / f"{shard}.arrow"), documents, names, np.uint16, masks)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def new_checkpoint(folder: Path, seed: int = 5) -> str:
    """Write a model with random weights to start from, and return its artefact's folder."""
    config = make_settings().new_model(VOCAB_SIZE)
    decoder = Decoder(config)
    init_weights(decoder, seed)
    if not (folder / "model").exists():
        save_checkpoint_folder(
            decoder.state_dict(), config, folder / "model", dtype=torch.float32, max_shard_bytes=1 << 30
        )
    return str(folder)


def tuned_settings(**changes: Any) -> TrainSettings:
    """Return the small settings of a step that starts from a checkpoint, with changes."""
    raw = {**SMALL, **changes}
    del raw["model"]
    return decode_settings(TrainSettings, raw, where="train").for_model(make_settings().new_model(VOCAB_SIZE))


def tuning_task(folder: Path, settings: TrainSettings, kind: RowKind, name: str, **changes: Any) -> TrainTask:
    """Return a run over chats in `folder`, written if they are not there, from a checkpoint there."""
    shards = folder / kind
    if not shards.exists():
        write_chats(shards, kind)
    return TrainTask(
        settings=settings,
        config=make_settings().new_model(VOCAB_SIZE),
        shards=str(shards),
        rows=kind,
        init_from=new_checkpoint(folder / "start"),
        checkpoints=str(folder / name / "work" / "checkpoints"),
        output=str(folder / name),
        bos_token_id=0,
        eos_token_id=1,
        device="cpu",
        **changes,
    )
