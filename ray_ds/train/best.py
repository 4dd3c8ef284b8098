"""Going back to the best model at the end of training, where the recipe wants that one and not the last."""

import torch.distributed as dist

from ray_ds.logs import log_event
from ray_ds.train.checkpoints import CheckpointReader, Commit, find_best
from ray_ds.train.host import Host
from ray_ds.train.task import TrainTask
from ray_ds.train.zero.engine import Engine


def load_best(task: TrainTask, engine: Engine, host: Host) -> int:
    """Load the state with the lowest validation loss, of the regular checkpoints and the last step; return its step.

    All processes call this together, after the last step, once its checkpoint counts.

    Raises:
        ArtifactError: that checkpoint is damaged.
        FloatingPointError: no validation loss is a number.
    """
    settings = task.settings
    found: list[Commit | None] = [None]
    if host.rank == 0:
        found = [find_best(task.checkpoints, every=settings.checkpoint_every, last=settings.num_steps)]
    dist.broadcast_object_list(found, src=0)
    commit = found[0]
    if commit is None:
        action = "lower the learning rate, or look at the validation split"
        raise FloatingPointError(f"no checkpoint has a validation loss that is a number; {action}")
    if commit.step != settings.num_steps:
        with CheckpointReader(task.checkpoints, commit) as reader:
            engine.load_state(reader)
    if host.rank == 0:
        log_event("best_model", step=commit.step, validation_loss=commit.validation_loss, of_steps=settings.num_steps)
    return commit.step
