"""Events of a run that were written so many seconds after noon."""

import datetime
from typing import Any

NOON = datetime.datetime(2026, 5, 1, 12, tzinfo=datetime.UTC).timestamp()


def event(kind: str, at: float, **fields: Any) -> dict[str, Any]:
    """Return an event of so many seconds after noon."""
    moment = datetime.datetime.fromtimestamp(NOON + at, datetime.UTC)
    return {"time": moment.isoformat(timespec="milliseconds"), "event": kind, **fields}
