"""What benchmarks share: the command that they measure, and how they say what they found."""

import statistics
import sys

_START = "import sys; from orchestrator.cli import main; sys.exit(main())"
ORCHESTRATOR = [sys.executable, "-c", _START]
"""The program as users call it, of this very environment."""


def say(line: str) -> None:
    """Print progress where it does not mix with the table."""
    print(line, file=sys.stderr, flush=True)


def spread(values: list[float], digits: int) -> str:
    """Return median and spread."""
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"
