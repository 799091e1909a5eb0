"""Loggers by class path: checked beforehand, found again, and no reason to stop training."""

import csv
import importlib.util
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import CSVLogger, Logger

from orchestrator.config import Config, TrainConfig, UserError
from orchestrator.train.logs.loggers import build_loggers, check_loggers, remember_ids
from orchestrator.train.logs.patient import patient

CSV = "pytorch_lightning.loggers.CSVLogger"


def config_with(*loggers: Any) -> Config:
    return Config(name="logged", train=TrainConfig(loggers=list(loggers)))


class Events(list[dict[str, Any]]):
    """Takes events as a run does."""

    def __call__(self, kind: str, /, **fields: Any) -> None:
        self.append({"event": kind, **fields})


class Gone(Logger):
    """Its server is gone."""

    name = version = "gone"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        raise ConnectionError("no route to host")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host")


class Slow(Gone):
    """Its server answers when told to."""

    answer = threading.Event()

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.answer.wait(20)


class Refused(Gone):
    """It cannot be built."""

    def __init__(self) -> None:
        raise ConnectionError("no login")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"class": "x"}, r"train\.loggers\[0\]=.*must be"),
        ({"class_path": "pytorch_lightning.loggers.CsvLogger"}, "did you mean"),
        ({"class_path": "nowhere.Logger"}, "No module named 'nowhere'"),
        ({"class_path": "pathlib.Path"}, "is no Logger"),
        ({"class_path": CSV, "init_args": {"save_di": "x"}}, "did you mean 'save_dir'"),
        ({"class_path": CSV, "init_args": 3}, "must be"),
    ],
)
def test_a_wrong_logger_is_said_before_anything_starts(entry: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_loggers(config_with(entry))


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_package_that_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == name else find(n))
    kind = {"mlflow": "MLFlowLogger", "wandb": "WandbLogger"}[name]
    with pytest.raises(UserError, match=rf"needs the package {name}.*orchestrator\[{name}\]"):
        check_loggers(config_with({"class_path": f"pytorch_lightning.loggers.{kind}"}))


def test_values_arrive_at_their_steps(tmp_path: Path) -> None:
    events = Events()
    config = config_with({"class_path": CSV, "init_args": {"name": "csv", "version": 0}})
    check_loggers(config)
    (logger,) = build_loggers(config, str(tmp_path), tmp_path, events)
    assert isinstance(logger, CSVLogger)
    logger.log_hyperparams({"data.global_batch": 13})
    logger.log_metrics({"train_loss": 0.5, "samples": 65}, 5)
    logger.log_metrics({"train_loss": 0.25, "samples": 130}, 10)
    logger.finalize("success")
    rows = list(csv.DictReader((tmp_path / "csv" / "version_0" / "metrics.csv").open()))
    assert [(row["step"], row["train_loss"], row["samples"]) for row in rows] == [
        ("5", "0.5", "65"),
        ("10", "0.25", "130"),
    ]
    assert "global_batch: 13" in (tmp_path / "csv" / "version_0" / "hparams.yaml").read_text()
    assert events == []


def test_a_server_that_is_gone_is_said_once_a_minute() -> None:
    events = Events()
    logger = patient(Gone, {}, tell=events)
    for step in range(50):
        logger.log_metrics({"train_loss": 1.0}, step)
    logger.finalize("success")
    assert len(events) == 1
    assert events[0]["event"] == "logger_failed"
    assert events[0]["logger"] == "Gone"
    assert "ConnectionError: no route to host" in events[0]["error"]


def test_a_server_that_hangs_holds_nothing_up() -> None:
    events = Events()
    logger = patient(Slow, {}, tell=events)
    began = time.perf_counter()
    for step in range(1_500):
        logger.log_metrics({"train_loss": 1.0}, step)
    took_s = time.perf_counter() - began
    Slow.answer.set()
    logger.finalize("success")
    assert took_s < 2
    assert [event["error"] for event in events] == ["it does not keep up"]


def test_a_logger_that_cannot_be_built_is_left_out(tmp_path: Path) -> None:
    events = Events()
    config = config_with({"class_path": f"{__name__}.Refused"}, {"class_path": CSV})
    built = build_loggers(config, str(tmp_path), tmp_path, events)
    assert [logger.kind for logger in built] == ["CSVLogger"]
    assert events[0]["error"].startswith("ConnectionError: no login")
    built[0].finalize("success")


class Remembering(Gone):
    """Chooses an id where it is given none, as MLflow's server does."""

    def __init__(self, run_name: str = "", run_id: str | None = None) -> None:
        super().__init__()
        self.run_name, self.run_id = run_name, run_id or "chosen-by-the-server"


def test_a_resumed_run_goes_on_in_the_same_run_of_its_server(tmp_path: Path) -> None:
    config = config_with({"class_path": f"{__name__}.Remembering"})
    first: Any = build_loggers(config, str(tmp_path), tmp_path, Events())
    remember_ids(str(tmp_path), first)
    first[0].run_id = "another"
    again: Any = build_loggers(config, str(tmp_path), tmp_path, Events())
    assert (again[0].run_name, again[0].run_id) == ("logged", "chosen-by-the-server")
    for logger in [*first, *again]:
        logger.finalize("success")
