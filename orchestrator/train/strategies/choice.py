"""A setting that was decided for the user. Light: a job holds one wherever it is unpickled."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Choice:
    """A setting that was decided for the user, and why."""

    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.value}: {self.reason}"
