"""The followers of a run, all of them and in their order: the one place that names them.

Next files: the followers, none of which knows another.
"""

from __future__ import annotations

from functools import partial

from megagpt.model.gpt import count_parameters
from megagpt.monitor.metrics import MetricLogger
from megagpt.training.engine import parameter_norm
from megagpt.training.followers.figures import Figures
from megagpt.training.followers.finite import Finite
from megagpt.training.followers.record import Follower
from megagpt.training.followers.saving import Saving
from megagpt.training.followers.startup import Startup
from megagpt.training.followers.stopping import Stopping
from megagpt.training.followers.summary import Summary
from megagpt.training.followers.validation import Validation
from megagpt.training.start import Session


def followers_of(
    session: Session, metrics: MetricLogger, stopping: Stopping
) -> tuple[Follower, ...]:
    """What follows each step of a session; each sees what those before it added to the record.

    A follower gets the session for its engine, groups and batches; of the settings its section.

    Args:
        session: That takes the steps.
        metrics: Where figures and losses go.
        stopping: Gives the verdict that those after it read.
    """
    run, config, state = session.run, session.run.config, session.state
    num_skipped = state.step - state.adam_step
    weights_norm = partial(parameter_norm, session.engine, session.groups)
    saving = Saving(session.checkpointer, config.checkpoint, weights_norm)
    return (
        Startup(
            session.checkpointer.agreement, config.parallel.collective_timeout_minutes
        ).after_step,
        Finite(session.engine).after_step,
        Figures(session, metrics, config.monitor, config.model, num_skipped).after_step,
        stopping.after_step,
        saving.meet_failure,
        Validation(
            session, metrics, config.training.eval_interval, lambda: stopping.notices().is_told
        ).after_step,
        Summary(run.directory, run.rank, count_parameters(config.model), run.start_time).after_step,
        saving.after_step,
    )
