"""What a run measured about itself, for a verdict. Pure."""

import dataclasses
from collections.abc import Mapping

from orchestrator.train.timing.timeline import STEP, Part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run measured about itself."""

    seconds: Mapping[Part, float]
    """Since the first allocation, by part; "other" of the step loop only."""
    stats: Mapping[str, float]
    """Of the last checkpoint: see `Clocks.totals`, and `Costs` for what reading cost."""
    strategy: str
    workers: int
    accumulation: int
    """Micro-batches of one worker in one step."""
    epochs: int
    restarts: int
    slots: int
    """Read tasks that run at once."""
    spare_cpus: float
    """CPUs of the cluster that the workers, and validation beside them, leave to the readers."""
    ran_out: bool = False
    """Whether micro-batches were made smaller than the config asks, for lack of memory."""

    @property
    def loop_s(self) -> float:
        """Seconds of steps."""
        return max(sum(self.seconds[part] for part in STEP), 1e-9)

    @property
    def running_s(self) -> float:
        """Seconds of everything but the first start."""
        return max(sum(self.seconds.values()) - self.seconds["startup"], 1e-9)

    def of_step(self, name: str, part: Part) -> float:
        """Return a share of each step: of this start where that was measured, else of all."""
        step_s = self.stats.get("step_s", 0.0)
        if step_s and name in self.stats:
            return min(1.0, max(0.0, self.stats[name] / step_s))
        return self.seconds[part] / self.loop_s

    @property
    def gain(self) -> float | None:
        """How many times faster steps are with data for free; None: that was not measured.

        No more than without their waits, unless readers take the workers' CPUs: the few steps that
        were measured may have been quick ones.
        """
        ceiling_s, step_s = self.stats.get("ceiling_s", 0.0), self.stats.get("step_s", 0.0)
        if not ceiling_s or not step_s:
            return None
        most = step_s / ceiling_s
        return max(1.0, most if self.shares_cpus else min(most, 1 / (1.001 - self.wait_share)))

    @property
    def shares_cpus(self) -> bool:
        """Whether readers run on the workers' CPUs."""
        return self.slots > self.spare_cpus

    @property
    def wait_share(self) -> float:
        """Share of each step in which the worker that waits longest for data does so."""
        return self.of_step("wait_s_of_step", "wait")

    @property
    def decoding(self) -> float:
        """Share of the time in which the read tasks decoded."""
        return self.stats.get("decode_s", 0.0) / (self.slots * self.loop_s)

    @property
    def sharing(self) -> float:
        """Share of each step that readers take from the workers' CPUs.

        Where it was not measured: of a CPU that a worker shares with a reader, the kernel gives one
        that is always busy half.
        """
        if not self.shares_cpus:
            return 0.0
        return 1 - 1 / self.gain if self.gain else min(1.0, self.decoding) / 2

    @property
    def busy(self) -> float:
        """Share of the time in which the read tasks read or decoded."""
        spent = self.stats.get("read_s", 0.0) + self.stats.get("decode_s", 0.0)
        return spent / (self.slots * self.loop_s)
