"""A thousand schedules of kills, joins, drains and stops by seed: nobody can tell from the samples.

The sampler, the grid and the shares are the project's. What is modelled here, as plainly as it goes, is what a loop
does with them: it saves (step, cursor, weights) at times, and after whatever happens goes on from the newest state that
is left, at any world size; after a bad step it goes back to the newest regular checkpoint, as `Safekeeping.go_back`
does. The weights are modelled by the list of samples that made them.
"""

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import pytest

from ray_ds.data.sampler import Sampler
from ray_ds.train.batches import Grid, share_of

NUM_SCHEDULES = 1000
BLOCKS = 10
MAX_WORKERS = 8
Event = Literal["kill", "kill while saving", "kill all", "join", "drain", "stop"]
EVENTS: tuple[Event, ...] = ("kill", "kill while saving", "kill all", "join", "drain", "stop")


@dataclass(frozen=True)
class Settings:
    """One recipe. `bad_batches` have a loss that is no number, whoever computes it."""

    shard_rows: tuple[int, ...]
    window_shards: int
    micro_batch: int
    num_micro_batches: int
    num_steps: int
    checkpoint_every: int
    keep_checkpoints: int
    snapshot_every: int
    bad_loss: Literal["skip", "roll_back"]
    bad_batches: frozenset[int]
    seed: int

    @property
    def batch_rows(self) -> int:
        return self.micro_batch * self.num_micro_batches

    def make_grid(self) -> Grid:
        options = {"window_shards": self.window_shards, "batch_rows": self.batch_rows}
        return Grid(Sampler(self.shard_rows, seed=self.seed, **options), self.micro_batch)


def draw_settings(rng: random.Random) -> Settings:
    """Draw a recipe of a few epochs or less, whose steps end anywhere in an epoch."""
    shard_rows = [rng.choice([0, 1, rng.randint(1, 30)]) for _ in range(rng.randint(1, 8))]
    num_steps = rng.randint(7, 16)
    checkpoint_every, num_bad = rng.randint(2, 6), rng.choice([0, 0, 1, 3])
    return Settings(
        shard_rows=(*shard_rows, rng.randint(1, 30)),
        window_shards=rng.randint(1, 4),
        micro_batch=rng.randint(1, 4),
        num_micro_batches=rng.randint(1, 12),
        num_steps=num_steps,
        checkpoint_every=checkpoint_every,
        keep_checkpoints=rng.randint(1, 3),
        snapshot_every=rng.choice([0, 1, 2, 3]),
        bad_loss=rng.choice(["skip", "roll_back"]),
        bad_batches=frozenset(
            rng.sample(range(checkpoint_every, num_steps), min(num_bad, num_steps - checkpoint_every))
        ),
        seed=rng.randrange(100),
    )


@dataclass(frozen=True)
class State:
    """What a checkpoint holds. `made_of`: of each step done its batch's number and samples; none where it was skipped.

    `passed_over`: batches that made no weights, for they were bad or their steps were rolled back.
    """

    step: int = 0
    cursor: int = 0
    made_of: tuple[tuple[int, tuple[int, ...]], ...] = ()
    passed_over: tuple[int, ...] = ()


@dataclass
class Job:
    """A run from its first submission to its end; what is in memory is lost with all nodes, checkpoints are not."""

    settings: Settings
    rng: random.Random | None
    checkpoints: dict[int, State] = field(default_factory=dict)
    snapshots: dict[int, State] = field(default_factory=dict)
    world_size: int = 1
    num_events: Counter[Event] = field(default_factory=Counter)

    def run(self) -> State:
        """Start groups of workers until one is done."""
        while True:
            end = self._run_group(self._newest())
            if end is not None:
                return end

    def _newest(self) -> State:
        safe = {**self.snapshots, **self.checkpoints}
        return safe[max(safe)] if safe else State()

    def _run_group(self, state: State) -> State | None:
        """Train from a state on; return the last one, or None when the workers are gone."""
        grids = [self.settings.make_grid() for _ in range(self.world_size)]  # a process knows nothing of an earlier one
        asked: Event | None = None
        while state.step < self.settings.num_steps:
            event = asked or self._next_event()
            if event == "kill" or event == "kill all":
                self._compute(state.cursor, grids)  # in vain
                return self._lose(event)
            done = state.step
            state = self._after_step(state, self._compute(state.cursor, grids))
            if event == "kill while saving":
                return self._lose(event)
            if state.step <= done:  # it went back: what is asked for comes after the next step
                asked = event
                continue
            self._keep(state, event)
            if event is not None:
                self._leave(event)
                assert self._newest() == state, "these lose nothing"
                return None
        return state

    def _keep(self, state: State, event: Event | None) -> None:
        """Save a state where it is due, and for who leaves: in memory before a restart, on storage before the end."""
        to_memory = self.settings.snapshot_every > 0 and event != "stop"
        if self._is_regular(state.step) or (event is not None and not to_memory):
            self._checkpoint(state)
        if to_memory and (event is not None or state.step % self.settings.snapshot_every == 0):
            self.snapshots = {state.step: state}

    def _next_event(self) -> Event | None:
        if self.rng is None or sum(self.num_events.values()) >= 12 or self.rng.random() > 0.3:
            return None
        event = self.rng.choice(EVENTS)
        self.num_events[event] += 1
        return event

    def _lose(self, event: Event) -> None:
        """Go on with fewer or as many; a snapshot is on two nodes, so that it is lost only with both."""
        assert self.rng is not None
        if event == "kill all" or self.rng.random() < 0.2:
            self.snapshots = {}
        self.world_size = self.rng.randint(1, MAX_WORKERS if event == "kill all" else self.world_size)

    def _leave(self, event: Event) -> None:
        assert self.rng is not None
        if event == "stop":  # the job ends, and is submitted again to whatever cluster there is
            self.snapshots = {}
            self.world_size = self.rng.randint(1, MAX_WORKERS)
        else:
            smallest, largest = (1, self.world_size) if event == "drain" else (self.world_size, MAX_WORKERS)
            self.world_size = self.rng.randint(smallest, largest)

    def _compute(self, cursor: int, grids: list[Grid]) -> tuple[int, ...]:
        """Return the samples of a batch, micro-batches in order, as the ranks together compute them."""
        settings = self.settings
        num_micro_batches, world_size = settings.num_micro_batches, len(grids)
        shares = [share_of(num_micro_batches, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert {len(share) for share in shares} == {-(-num_micro_batches // world_size)}
        counts = [sum(index is not None for index in share) for share in shares]
        assert max(counts) - min(counts) <= 1
        parts: dict[int, tuple[int, ...]] = {}
        for share, grid in zip(shares, grids, strict=True):
            for index in share:
                rows = tuple(grid.rows(cursor, index).tolist())
                if index is None:
                    assert rows == (-1,) * settings.micro_batch
                    continue
                assert index not in parts, "no two ranks compute one micro-batch"
                parts[index] = rows
        return tuple(row for index in range(num_micro_batches) for row in parts[index])

    def _after_step(self, state: State, samples: tuple[int, ...]) -> State:
        """Return the state after a step; a bad one leaves the weights or goes back with the data behind it."""
        settings, cursor = self.settings, state.cursor
        if cursor not in settings.bad_batches:
            return State(state.step + 1, cursor + 1, (*state.made_of, (cursor, samples)), state.passed_over)
        if settings.bad_loss == "skip":
            return State(state.step + 1, cursor + 1, state.made_of, (*state.passed_over, cursor))
        back = self.checkpoints[max(filter(self._is_regular, self.checkpoints))]
        self.checkpoints = {step: saved for step, saved in self.checkpoints.items() if step <= back.step}
        return State(back.step, cursor + 1, back.made_of, (*back.passed_over, *range(back.cursor, cursor + 1)))

    def _is_regular(self, step: int) -> bool:
        return step % self.settings.checkpoint_every == 0

    def _checkpoint(self, state: State) -> None:
        """Keep the newest checkpoints, and the newest regular one, which is there before the first bad batch."""
        saved = {**self.checkpoints, state.step: state}
        steps = sorted(saved)
        kept = {*steps[-self.settings.keep_checkpoints :], *list(filter(self._is_regular, steps))[-1:]}
        self.checkpoints = {step: saved[step] for step in steps if step in kept}


def check_samples(settings: Settings, end: State) -> None:
    """Check that every row is in each whole epoch once, and that what was passed over is all that is missing."""
    used = [cursor for cursor, _ in end.made_of]
    assert used == sorted(set(used))
    assert sorted([*used, *end.passed_over]) == list(range(end.cursor))
    by_batch = dict(end.made_of)
    grid = settings.make_grid()
    assert all(samples == tuple(grid.sampler.rows(cursor).tolist()) for cursor, samples in end.made_of)
    passed = {cursor: tuple(grid.sampler.rows(cursor).tolist()) for cursor in end.passed_over}
    stream = [row for cursor in range(end.cursor) for row in (by_batch | passed)[cursor]]
    num_rows = sum(settings.shard_rows)
    for start in range(0, len(stream), num_rows):
        epoch = Counter(stream[start : start + num_rows])
        assert max(epoch.values()) == 1
        assert len(epoch) == min(num_rows, len(stream) - start)


@pytest.mark.shows(
    "In 1,000 random schedules of kills, joins, drains and stops at 1 to 8 workers, every step has the samples that it "
    "has undisturbed on one worker, and every sample comes once an epoch; roll backs go to the same step and pass over "
    "the same samples"
)
@pytest.mark.parametrize("block", range(BLOCKS))
def test_no_schedule_changes_a_sample(block: int) -> None:
    happened: Counter[Event] = Counter()
    for seed in range(block, NUM_SCHEDULES, BLOCKS):
        rng = random.Random(seed)
        settings = draw_settings(rng)
        alone = Job(settings, None).run()
        check_samples(settings, alone)
        job = Job(settings, rng, world_size=rng.randint(1, MAX_WORKERS))
        assert job.run() == alone, f"schedule {seed}"
        happened += job.num_events
    assert all(happened[event] > 20 for event in EVENTS)


def test_schedules_cover_what_is_hard() -> None:
    """Epochs that end within a step, steps of several epochs, more workers than micro-batches, both kinds of bad."""
    settings = [draw_settings(random.Random(seed)) for seed in range(NUM_SCHEDULES)]
    epochs = [one.num_steps * one.batch_rows / sum(one.shard_rows) for one in settings]
    assert sum(1.5 < epoch < 20 and epoch != int(epoch) for epoch in epochs) > 300
    assert sum(one.batch_rows > 2 * sum(one.shard_rows) for one in settings) > 30
    assert sum(one.num_micro_batches < MAX_WORKERS for one in settings) > 300
    assert sum(one.num_micro_batches % 2 for one in settings) > 300
    assert min(Counter(one.bad_loss for one in settings if one.bad_batches).values()) > 200
