"""Names for processes that hold across restarts and containers: ids alone come back. No Ray."""

import os
from pathlib import Path


def machine() -> str:
    """Return the boot and the process-id space of this process, or nothing but on Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def born(pid: int) -> str:
    """Return when a process began, in clock ticks since the boot; empty where it has ended."""
    try:
        # The name, which may hold anything, is in brackets.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
