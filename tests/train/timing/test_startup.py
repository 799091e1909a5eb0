"""Where a start's seconds went, and what keeps it short: the controller loads no torch."""

import gc
import subprocess
import sys
import time

import pytest

from orchestrator.train.timing.startup import Startup, importing, process_began


def test_phases_add_up() -> None:
    startup = Startup(100.0, [("imports", 103.0), ("ray", 105.5), ("workers", 110.0)])
    assert startup.seconds == {"imports": 3.0, "ray": 2.5, "workers": 4.5}
    assert startup.total_s == sum(startup.seconds.values())
    assert Startup(100.0).total_s == 0


def test_a_phase_that_comes_twice_is_one() -> None:
    startup = Startup(0.0, [("imports", 1.0), ("ray", 2.0), ("imports", 4.0)])
    assert startup.seconds == {"imports": 3.0, "ray": 1.0}


def test_a_start_after_a_failure_leaves_out_what_came_before() -> None:
    startup = Startup(100.0, [("imports", 103.0), ("workers", 160.0), ("first step", 161.5)])
    again = startup.since(150.0)
    assert again.seconds == {"workers": 10.0, "first step": 1.5}
    assert again.total_s == 11.5


def test_a_mark_ends_a_phase_now() -> None:
    startup = Startup(time.time())
    startup.mark("nothing")
    assert 0 <= startup.total_s < 5


def test_the_beginning_of_a_process_is_known() -> None:
    code = (
        "import time; time.sleep(0.5); "
        "from orchestrator.train.timing.startup import process_began; "
        "print(time.time() - process_began())"
    )
    began = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.5 <= float(done.stdout) <= time.time() - began + 0.05
    assert process_began() < began


def test_importing_leaves_the_collector_as_it_was() -> None:
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("orchestrator.train.recovery.elastic", {"torch", "pytorch_lightning"}),
        ("orchestrator.train.recovery.group", {"torch", "pytorch_lightning"}),
        ("orchestrator.train.recovery.mistakes", {"torch", "pytorch_lightning"}),
        ("orchestrator.train.entry", {"torch", "pytorch_lightning"}),
        ("orchestrator.train.job", {"torch", "pytorch_lightning"}),
        # It starts reading; what follows imports Lightning meanwhile.
        ("orchestrator.train.worker", {"pytorch_lightning"}),
    ],
)
def test_what_starts_first_is_light(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
