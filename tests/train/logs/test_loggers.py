"""Loggers by class path: checked beforehand, found again, and no reason to stop training."""

import csv
import importlib.util
import json
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import CSVLogger, Logger
from told import Events

from orchestrator.config import Config, TrainConfig, UserError
from orchestrator.train.logs.loggers import IDS_FILE, build_loggers, check_loggers

CSV = "pytorch_lightning.loggers.CSVLogger"


def config_with(*loggers: Any) -> Config:
    return Config(name="logged", train=TrainConfig(loggers=list(loggers)))


class Gone(Logger):
    """Its server is gone."""

    name = version = "gone"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        raise ConnectionError("no route to host")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host")


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


def test_mlflow_needs_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # it is not installed
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    entry = {"class_path": "pytorch_lightning.loggers.MLFlowLogger"}
    with pytest.raises(UserError, match=r"loggers\[0\]\.init_args\.tracking_uri is missing"):
        check_loggers(config_with(entry))
    check_loggers(config_with({**entry, "init_args": {"tracking_uri": "http://localhost:5000"}}))


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


def test_a_logger_that_cannot_be_built_is_left_out(tmp_path: Path) -> None:
    events = Events()
    config = config_with({"class_path": f"{__name__}.Refused"}, {"class_path": CSV})
    built = build_loggers(config, str(tmp_path), tmp_path, events)
    assert [logger.kind for logger in built] == ["CSVLogger"]
    assert events[0]["error"].startswith("ConnectionError: no login")
    built[0].finalize("success")


class Remembering(CSVLogger):
    """Chooses an id where it is given none, as MLflow's server does; down as long as told so."""

    down = False

    def __init__(self, save_dir: str, run_name: str = "", run_id: str | None = None) -> None:
        super().__init__(save_dir)
        self.run_name, self.run_id = run_name, run_id or uuid.uuid4().hex

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if self.down:
            raise ConnectionError("no route to host")


REMEMBERING = {"class_path": f"{__name__}.Remembering"}


def log(logger: Any) -> None:
    logger.log_metrics({"train_loss": 1.0}, 1)
    logger.finalize("success")


def test_a_resumed_run_goes_on_in_the_same_run_of_its_server(tmp_path: Path) -> None:
    config = config_with(REMEMBERING)
    (first,) = build_loggers(config, str(tmp_path), tmp_path, Events())
    log(first)
    (again,) = build_loggers(config, str(tmp_path), tmp_path, Events())
    found: Any = again
    assert (found.run_name, found.run_id) == ("logged", first.run_id)
    again.finalize("success")


def test_ids_belong_to_places_in_the_config_whatever_could_not_be_built(tmp_path: Path) -> None:
    config = config_with({"class_path": f"{__name__}.Refused"}, REMEMBERING, REMEMBERING)
    built = build_loggers(config, str(tmp_path), tmp_path, Events())
    for logger in built:
        log(logger)
    ids = json.loads((tmp_path / IDS_FILE).read_text())
    one, two = (logger.run_id for logger in built)
    assert ids == {"1-Remembering": one, "2-Remembering": two}


def test_an_id_is_remembered_once_the_server_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = Events()
    (logger,) = build_loggers(config_with(REMEMBERING), str(tmp_path), tmp_path, events)
    monkeypatch.setattr(Remembering, "down", True)
    logger.log_metrics({"train_loss": 1.0}, 1)
    while not events:
        time.sleep(0.01)
    assert not (tmp_path / IDS_FILE).exists()
    monkeypatch.setattr(Remembering, "down", False)
    log(logger)
    assert json.loads((tmp_path / IDS_FILE).read_text()) == {"0-Remembering": logger.run_id}


def test_ids_that_are_damaged_do_not_stop_a_run(tmp_path: Path) -> None:
    (tmp_path / IDS_FILE).write_text('{"0-Rem')
    (logger,) = build_loggers(config_with(REMEMBERING), str(tmp_path), tmp_path, Events())
    log(logger)
    assert json.loads((tmp_path / IDS_FILE).read_text()) == {"0-Remembering": logger.run_id}
