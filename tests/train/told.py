"""Stands for what writes a run's events."""

from typing import Any


class Events(list[dict[str, Any]]):
    """Takes events as a run does."""

    def __call__(self, kind: str, /, **fields: Any) -> None:
        self.append({"event": kind, **fields})
