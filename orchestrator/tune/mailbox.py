"""What the processes of a sweep tell each other: reports to a trial, the order to end back to it.

Ray's TuneReportCallback is not used: it writes to a queue of length one that the trial also empties
into its own results, which can block for ever where a trial ends while a report is under way; and a
`done` among the metrics would make Tune end a trial before its run is written down.
"""

import collections
import dataclasses
from typing import Any

import ray
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@dataclasses.dataclass
class Mail:
    """What waits for one trial."""

    reports: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Metrics of its validations, oldest first."""
    pruned: bool = False
    """Whether the scheduler wants it to end."""
    controller: Any = None
    """Handle of the Ray Train controller that reported last."""


class Mailbox:
    """The actor's state; one actor serves all trials."""

    def __init__(self) -> None:
        self._mail: dict[int, Mail] = collections.defaultdict(Mail)

    def post(self, trial: int, metrics: dict[str, Any], controller: Any) -> None:
        """Leave a report for a trial, with the controller to turn to."""
        self._mail[trial].reports.append(metrics)
        self._mail[trial].controller = controller

    def prune(self, trial: int) -> None:
        """Ask a trial to end."""
        self._mail[trial].pruned = True

    def take(self, trial: int) -> Mail:
        """Return what waits for a trial; each report is handed out once."""
        mail = self._mail[trial]
        self._mail[trial] = dataclasses.replace(mail, reports=[])
        return mail


def start_mailbox() -> Any:
    """Start a mailbox actor on this node, which outlives spot workers; it takes no CPU."""
    here = ray.get_runtime_context().get_node_id()
    strategy = NodeAffinitySchedulingStrategy(here, soft=False)
    return ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=strategy).remote()


class Forward(ray.train.UserCallback):  # type: ignore[misc]
    """Posts what rank 0 reports; runs in Ray Train's controller."""

    def __init__(self, mailbox: Any, trial: int) -> None:
        self._mailbox = mailbox
        self._trial = trial

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Wait until the report lies in the mailbox, so that it is there when training ends."""
        me = ray.get_runtime_context().current_actor
        ray.get(self._mailbox.post.remote(self._trial, metrics[0], me))
