"""The one thread that computes: it steps every checkpoint's run, and lets requests come and go between two steps."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from strop.generation import Run, prompt_logprobs
from strop.serving.models import ServedModel
from strop.types import Completion, Request, TokenLogprobs

PREFILL_TOKENS = 256
"""Of prompts, between two tokens of those who wait for text: a longer prompt goes in piece by piece."""

SCORE_TOKENS = 256
"""Prompts are scored together up to this many tokens, for the same reason; a longer one is scored in one go."""


class QueueFullError(Exception):
    """Too many samples wait already."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full, try again in {retry_after} s")
        self.retry_after = retry_after


class DamagedError(Exception):
    """The checkpoint gave numbers that are not finite: it answers no more."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token of one sample."""

    prompt: int
    sample: int
    token_id: int
    report: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class Finished:
    prompt: int
    sample: int
    completion: Completion


@dataclass(frozen=True, slots=True)
class Scored:
    """The logprobs of a prompt's tokens but its first."""

    prompt: int
    reports: list[TokenLogprobs]


@dataclass(frozen=True, slots=True)
class Failed:
    """The model could not go on; nothing follows."""

    is_damaged: bool


Event = Sampled | Finished | Scored | Failed


@dataclass(eq=False, slots=True, kw_only=True)
class Job:
    """One HTTP request: its prompts, and where their events go."""

    served: ServedModel
    requests: Sequence[Request]
    is_generated: bool = True
    """False only scores the prompts."""
    prompt_top: int | None = None
    """Score the prompts, with so many of the likeliest tokens each; None does not."""
    has_tokens: bool = False
    """Whether Sampled events are wanted."""
    loop: asyncio.AbstractEventLoop
    sink: Callable[[list[Event]], None]
    """Called in the loop's thread with what a step has brought; must not block."""
    events: list[Event] = field(default_factory=list)
    num_left: int = 0
    """Samples and scores that are not there yet."""

    @property
    def cost(self) -> int:
        num_samples = sum(request.num_samples for request in self.requests) if self.is_generated else 0
        return num_samples + (0 if self.prompt_top is None else len(self.requests))


class Worker:
    """Runs jobs on several checkpoints in one thread. submit and cancel may be called from any other.

    Example: with Worker([served], max_queue=256) as worker: worker.submit(job)
    """

    def __init__(self, models: Sequence[ServedModel], *, max_queue: int) -> None:
        self._lanes = {served.name: _Lane(served) for served in models}
        self._capacity = max_queue + sum(served.engine.num_slots for served in models)
        self._changed = threading.Condition()
        self._commands: deque[tuple[bool, Job]] = deque()
        self._load = 0
        self._seconds_per_sample = 0.1
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="strop-worker")

    def __enter__(self) -> Worker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop; what is under way then gets no more events."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def capacity(self) -> int:
        """Samples that can run and wait together."""
        return self._capacity

    @property
    def load(self) -> int:
        """Samples (and scores) that run or wait."""
        return self._load

    @property
    def damaged(self) -> list[str]:
        return [name for name, lane in self._lanes.items() if lane.is_damaged]

    def submit(self, job: Job) -> None:
        """Raises QueueFullError when its samples would not fit into the queue, DamagedError for a broken checkpoint."""
        with self._changed:
            if self._lanes[job.served.name].is_damaged:
                raise DamagedError
            if self._load + job.cost > self._capacity or not self._thread.is_alive():
                raise QueueFullError(min(60, max(1, round(self._seconds_per_sample * self._load))))
            self._load += job.cost
            job.num_left = job.cost
            self._commands.append((True, job))
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Free the slots of what is left of the job; harmless when nothing is."""
        with self._changed:
            self._commands.append((False, job))
            self._changed.notify()

    @torch.inference_mode()
    def _work(self) -> None:
        with ExitStack() as stack:
            for lane in self._lanes.values():
                # The weights never change, so that their packed copies serve for as long as the server lives.
                stack.enter_context(lane.served.model.decoding(lane.served.engine.num_slots))
            while self._take_commands():
                for lane in self._lanes.values():
                    started = time.perf_counter()
                    num_done = lane.step()
                    _hand_out(lane.take_events())
                    if num_done:
                        self._settle(num_done, time.perf_counter() - started)

    def _take_commands(self) -> bool:
        """Wait until there is something to do; False when the worker shall end."""
        with self._changed:
            while not (self._is_closing or self._commands or any(lane.is_busy for lane in self._lanes.values())):
                self._changed.wait()
            commands = list(self._commands)
            self._commands.clear()
        for is_new, job in commands:
            lane = self._lanes[job.served.name]
            if is_new:
                lane.add(job)
            elif num_dropped := lane.cancel(job):
                self._settle(num_dropped, 0.0)
        return not self._is_closing

    def _settle(self, num_done: int, seconds: float) -> None:
        with self._changed:
            self._load -= num_done
            if seconds:
                self._seconds_per_sample += 0.1 * (seconds / num_done - self._seconds_per_sample)


class _Lane:
    """One checkpoint's run and the prompts of it that wait to be scored."""

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self.is_damaged = False
        self._run: Run | None = None
        self._jobs: set[Job] = set()
        self._to_score: deque[tuple[Job, int]] = deque()
        self._num_done = 0

    @property
    def is_busy(self) -> bool:
        return bool(self._jobs)

    def add(self, job: Job) -> None:
        self._jobs.add(job)
        if job.prompt_top is not None:
            self._to_score.extend((job, index) for index in range(len(job.requests)))
        if job.is_generated:
            if self._run is None:
                self._run = self.served.engine.open(
                    on_finished=self._finished, on_token=self._sampled, max_prefill=PREFILL_TOKENS
                )
            self._run.add(((job, index), request) for index, request in enumerate(job.requests))

    def cancel(self, job: Job) -> int:
        """How many samples and scores are not to come any more."""
        if job not in self._jobs:
            return 0
        self._jobs.discard(job)
        self._to_score = deque(one for one in self._to_score if one[0] is not job)
        if self._run is not None:
            for index in range(len(job.requests)):
                self._run.cancel((job, index))
        num_dropped, job.num_left = job.num_left, 0
        return num_dropped

    def step(self) -> int:
        """One token for every sample, one batch of scores; returns how many samples and scores are done with."""
        self._num_done = 0
        if not self._jobs:
            return 0
        try:
            if self._to_score:
                self._score()
            if self._run is not None and self._run.is_unfinished:
                self._run.step()
        except Exception as error:  # whoever waits must hear of it, and others go on
            traceback.print_exc(file=sys.stderr)
            self._fail(is_damaged=isinstance(error, FloatingPointError))
        return self._num_done

    def take_events(self) -> list[tuple[Job, list[Event]]]:
        """What the step has brought, by job. Jobs of which nothing is left are done with."""
        taken: list[tuple[Job, list[Event]]] = []
        for job in list(self._jobs):
            if job.num_left == 0:
                self._jobs.discard(job)
            if job.events:
                taken.append((job, job.events))
                job.events = []
        return taken

    def _score(self) -> None:
        batch: list[tuple[Job, int]] = []
        num_tokens = 0
        while self._to_score:
            job, index = self._to_score[0]
            num_tokens += len(job.requests[index].prompt_ids)
            if batch and num_tokens > SCORE_TOKENS:
                break
            batch.append(self._to_score.popleft())
        prompts = [job.requests[index].prompt_ids for job, index in batch]
        scores = prompt_logprobs(self.served.model, prompts, [job.prompt_top or 0 for job, _ in batch])
        for (job, index), reports in zip(batch, scores, strict=True):
            self._done(job, Scored(index, reports))

    def _sampled(self, key: Hashable, sample: int, token_id: int, logprob: float, report: TokenLogprobs | None) -> None:
        job, index = _unpack(key)
        if job.has_tokens:
            job.events.append(Sampled(index, sample, token_id, report))

    def _finished(self, key: Hashable, sample: int, completion: Completion) -> None:
        job, index = _unpack(key)
        self._done(job, Finished(index, sample, completion))

    def _done(self, job: Job, event: Event) -> None:
        job.events.append(event)
        job.num_left -= 1
        self._num_done += 1

    def _fail(self, *, is_damaged: bool) -> None:
        self.is_damaged |= is_damaged
        self._run = None
        self._to_score.clear()
        for job in self._jobs:
            job.events.append(Failed(is_damaged))
            self._num_done += job.num_left
            job.num_left = 0


def _hand_out(batch: Sequence[tuple[Job, list[Event]]]) -> None:
    """Wake each loop once: a wake-up per job lets the loop's thread and this one fight for the interpreter."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, list[Event]]]] = {}
    for job, events in batch:
        by_loop.setdefault(job.loop, []).append((job, events))
    for loop, group in by_loop.items():
        try:
            loop.call_soon_threadsafe(_sink, group)
        except RuntimeError:
            assert loop.is_closed()  # the server has ended before its worker


def _sink(group: Sequence[tuple[Job, list[Event]]]) -> None:
    for job, events in group:
        job.sink(events)


def _unpack(key: Any) -> tuple[Job, int]:
    return key
