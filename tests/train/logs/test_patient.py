"""Lightning trains with loggers whose disk is full, or whose server is slow or gone."""

import contextlib
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from told import Events

from orchestrator.train.logs import patient as patience
from orchestrator.train.logs.patient import Patient, patient


class Logging(BoringModel):
    """Logs at every step, also by the logger's own object."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        found = super().training_step(batch, batch_idx)
        self.log("loss", found["loss"])
        for logger in self.loggers:
            _ = logger.experiment
        return found


def fit(*loggers: Logger, steps: int = 20) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=steps, logger=list(loggers), accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(Logging())
    return trainer


@pytest.fixture
def nowhere(tmp_path: Path) -> str:
    """Return a folder that cannot be made: a file is in its way."""
    (tmp_path / "file").touch()
    return str(tmp_path / "file" / "logs")


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_a_folder_that_cannot_be_made_does_not_stop_training(
    kind: type[Logger], nowhere: str
) -> None:
    events = Events()
    assert fit(patient(kind, {"save_dir": nowhere}, tell=events)).global_step == 20
    assert {event["logger"] for event in events} == {kind.__name__}
    assert "NotADirectoryError" in events[0]["error"]
    assert events[-1]["lost"] > 20


@contextlib.contextmanager
def small_disk() -> Iterator[None]:
    """Let no file grow beyond 2 kB, which writes notice as they notice a full disk: too late.

    No fixture: between tests pytest itself writes to a file that may be longer.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_does_not_stop_training(tmp_path: Path) -> None:
    events = Events()
    args = {"save_dir": str(tmp_path), "name": "", "version": ""}
    with small_disk():
        trainer = fit(patient(TensorBoardLogger, args, tell=events), steps=60)
    assert trainer.global_step == 60
    assert "File too large" in events[0]["error"]
    assert events[-1]["lost"] > 10


def test_tensorboard_sees_all_steps_in_order(tmp_path: Path) -> None:
    events = Events()
    args = {"save_dir": str(tmp_path), "name": "", "version": ""}
    fit(patient(TensorBoardLogger, args, tell=events))
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [each.step for each in found] == list(range(20))
    assert events == []


class Slow(CSVLogger):
    """Its server answers when told to."""

    answer = threading.Event()

    @property
    def experiment(self) -> Any:
        self.answer.wait(20)
        return super().experiment


def test_a_server_that_hangs_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "_READY_S", 0.2)
    monkeypatch.setattr(patience, "_CLOSE_S", 0.2)
    events = Events()
    logger = patient(Slow, {"save_dir": str(tmp_path)}, tell=events)
    began = time.perf_counter()
    fit(logger)
    assert time.perf_counter() - began < 10
    # 20 steps were logged, and saved, and the module's settings.
    assert events[-1]["error"] == "it did not end in time"
    assert events[-1]["lost"] >= 40
    Slow.answer.set()


class Gone(Logger):
    """Its server is gone."""

    name = version = "gone"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        raise ConnectionError("no route to host")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host")


def log(logger: Patient, entries: int) -> None:
    for step in range(entries):
        logger.log_metrics({"train_loss": 1.0}, step)


def test_what_is_lost_is_said_once_a_minute_and_counted_in_the_end() -> None:
    events = Events()
    logger = patient(Gone, {}, tell=events)
    log(logger, 50)
    logger.finalize("success")
    assert [event["lost"] for event in events] == [1, 50]
    assert {event["event"] for event in events} == {"logger_failed"}
    assert {event["logger"] for event in events} == {"Gone"}
    assert all("ConnectionError: no route to host" in event["error"] for event in events)


def test_more_than_fits_is_counted_as_lost(tmp_path: Path) -> None:
    events = Events()
    Slow.answer.clear()
    logger = patient(Slow, {"save_dir": str(tmp_path)}, tell=events)
    log(logger, 1_500)
    Slow.answer.set()
    logger.finalize("success")
    assert events[0]["error"] == "it does not keep up"
    # One was under way when the others came.
    assert events[-1]["lost"] in (499, 500)


def test_a_logger_without_an_object_of_its_own_has_none() -> None:
    logger = patient(Gone, {}, tell=Events())
    assert not hasattr(logger, "experiment")
    logger.finalize("success")
