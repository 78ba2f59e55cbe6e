"""The followers of a run, all of them and in their order: the one place that names them.

Next files: the followers, none of which knows another.
"""

from __future__ import annotations

from megagpt.model.gpt import count_parameters
from megagpt.monitor.metrics import MetricLogger
from megagpt.training.followers.figures import Figures
from megagpt.training.followers.record import Follower
from megagpt.training.followers.saving import Saving
from megagpt.training.followers.stopping import Stopping, StopSignal
from megagpt.training.followers.summary import Summary
from megagpt.training.followers.validation import Validation
from megagpt.training.start import Session


def followers_of(
    session: Session, metrics: MetricLogger, stop_signal: StopSignal
) -> tuple[Follower, ...]:
    """What follows each step of a session; each sees what those before it added to the record.

    Args:
        session: That takes the steps.
        metrics: Where figures and losses go.
        stop_signal: Whether this process was told to stop.
    """
    run, config, state = session.run, session.run.config, session.state
    figures = Figures(
        metrics,
        config.monitor,
        config.model,
        global_batch_size=config.batch.global_batch_size,
        engine=session.engine,
        groups=session.groups,
        num_skipped=state.step - state.adam_step,
    )
    stopping = Stopping(
        config.training,
        start_time=run.start_time,
        stop_signal=stop_signal,
        checkpointer=session.checkpointer,
    )
    validation = Validation(
        metrics,
        eval_interval=config.training.eval_interval,
        engine=session.engine,
        batches=session.batches,
        groups=session.groups,
    )
    summary = Summary(
        run.directory,
        rank=run.rank,
        num_parameters=count_parameters(config.model),
        start_time=run.start_time,
    )
    saving = Saving(session.checkpointer, config.checkpoint)
    return (
        figures.after_step,
        stopping.after_step,  # the verdict that those after it read
        saving.meet_failure,
        validation.after_step,
        summary.after_step,
        saving.after_step,
    )
