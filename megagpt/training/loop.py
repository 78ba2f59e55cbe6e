"""The loop: a step, the followers in their order, and their verdict.

Next files: `train_step.py` (the step), `followers/order.py` (who follows it).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import TypeAlias

from megagpt.monitor.metrics import MetricLogger
from megagpt.training.followers.order import followers_of
from megagpt.training.followers.record import Follower, StepRecord
from megagpt.training.followers.stopping import Stopping, StopSignal
from megagpt.training.schedule import learning_rate
from megagpt.training.start import Session
from megagpt.training.train_step import Message, Notices, StepResult, train_step

logger = logging.getLogger("megagpt")

OnStep: TypeAlias = Callable[[StepResult], bool | None]


def loop(session: Session, on_step: OnStep | None = None) -> StepRecord | None:
    """Takes steps until the followers' verdict ends the run.

    Args:
        session: From `start`.
        on_step: Called after each step with its exact figures, on every rank; where all return
            True, the run ends there, with no evaluation and no checkpoint.

    Returns:
        The last step with what the followers added to it; None if on_step ended the run.
    """
    run, state = session.run, session.state
    with StopSignal() as stop_signal:
        metrics = MetricLogger(
            run.directory / "tensorboard",
            rank=run.rank,
            train_steps=run.config.training.train_steps,
            step=state.step,
            consumed_samples=state.consumed_samples,
        )
        metrics.text("resolved configuration", run.resolved.table())
        stopping = Stopping(run.config.training, run.start_time, stop_signal, session.checkpointer)
        followers = followers_of(session, metrics, stopping)
        last = take_steps(session, followers, on_step, notices=stopping.notices)
    metrics.close()
    return last


def take_steps(
    session: Session,
    followers: tuple[Follower, ...],
    on_step: OnStep | None = None,
    *,
    notices: Callable[[], Notices],
) -> StepRecord | None:
    """The loop itself; see `loop`. `notices` is what this rank tells the others after a step."""
    num_tokens = None
    while True:
        record = advance(session, notices, num_tokens=num_tokens)
        num_tokens = record.result.next_tokens
        if on_step is not None and on_step(record.result):
            return None
        for follow in followers:
            record = follow(record) or record
        if record.verdict.stop:
            logger.info(f"stopping at step {record.state.step}: {record.verdict.stop}")
            return record


def advance(
    session: Session, notices: Callable[[], Notices] = Notices, *, num_tokens: int | None = None
) -> StepRecord:
    """Takes one optimizer step; the session's state is the one after it.

    Args:
        session: That takes the steps.
        notices: See `take_steps`.
        num_tokens: Valid tokens of the global batch, as the step before told; None: count them.
    """
    config, before = session.run.config, session.state
    begin = time.monotonic()
    step = before.step + 1
    lr = learning_rate(
        step,
        config.optimizer,
        decay_steps=config.decay_steps,
        wsd_decay_steps=config.wsd_decay_steps,
    )
    batches = session.batches.training(before.consumed_samples, step=step)
    result = train_step(
        session.engine,
        batches,
        groups=session.groups,
        lr=lr,
        num_tokens=num_tokens,
        message=lambda: Message(session.batches.num_tokens_ahead(), notices()),
    )
    session.state = dataclasses.replace(
        before,
        step=step,
        consumed_samples=before.consumed_samples + config.batch.global_batch_size,
        consumed_tokens=before.consumed_tokens + result.num_tokens,
        learning_rate=lr,
    )
    return StepRecord(
        session.state,
        result,
        seconds=time.monotonic() - begin,
        data_wait_seconds=session.batches.wait_seconds,
        was_applied=session.engine.was_step_applied(),
    )
