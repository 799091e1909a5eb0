"""MLflow and W&B as their extras install them: against a small server, and offline."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from told import Events

from orchestrator.config import Config, TrainConfig
from orchestrator.train.logs.loggers import IDS_FILE, build_loggers, check_loggers


class Tracking(http.server.BaseHTTPRequestHandler):
    """What of MLflow's REST API a logger uses."""

    posted: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    runs = 0

    def do_GET(self) -> None:
        run = {"info": {"run_id": "run-1", "experiment_id": "7", "status": "RUNNING"}, "data": {}}
        named = {"experiment_id": "7", "name": "photos", "lifecycle_stage": "active"}
        self._answer({"run": run} if "runs/get" in self.path else {"experiment": named})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = self.path.rpartition("mlflow/")[2]
        self.posted.append((name, body))
        type(self).runs += name == "runs/create"
        info = {"run_id": f"run-{self.runs}", "experiment_id": "7", "status": "RUNNING"}
        self._answer({"run": {"info": info, "data": {}}, "run_info": info})

    def _answer(self, content: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Tracking) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


def log(config: Config, run: Path) -> Events:
    check_loggers(config)
    events = Events()
    (logger,) = build_loggers(config, str(run), run / "loggers", events)
    _ = logger.experiment  # as Lightning does before training
    logger.log_hyperparams({"data.global_batch": 13})
    logger.log_metrics({"train_loss": 0.5, "samples": 65}, 5)
    logger.save()
    logger.finalize("success")
    return events


def config_with(name: str, **init_args: Any) -> Config:
    entry = {"class_path": f"pytorch_lightning.loggers.{name}", "init_args": init_args}
    return Config(name="logged", train=TrainConfig(loggers=[entry]))


def test_mlflow_gets_one_run_of_two_starts(server: str, tmp_path: Path) -> None:
    config = config_with("MLFlowLogger", tracking_uri=server, experiment_name="photos")
    assert log(config, tmp_path) == []
    assert json.loads((tmp_path / IDS_FILE).read_text()) == {"0-MLFlowLogger": "run-1"}
    assert log(config, tmp_path) == []
    names = [name for name, _ in Tracking.posted]
    assert names.count("runs/create") == 1
    assert names.count("runs/update") == 2
    batches = [body for name, body in Tracking.posted if name == "runs/log-batch"]
    logged = [metric for batch in batches for metric in batch.get("metrics", [])]
    assert [(m["key"], m["value"], m["step"]) for m in logged[:2]] == [
        ("train_loss", 0.5, 5),
        ("samples", 65, 5),
    ]


def test_mlflow_whose_server_is_gone_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    events = log(config_with("MLFlowLogger", tracking_uri="http://127.0.0.1:9"), tmp_path)
    assert "Max retries exceeded" in events[0]["error"]
    assert events[-1]["lost"] == 3


def test_wandb_works_offline(tmp_path: Path) -> None:
    assert log(config_with("WandbLogger", offline=True, project="photos"), tmp_path) == []
    (written,) = (tmp_path / "loggers").glob("wandb/offline-run-*/run-*.wandb")
    assert written.stat().st_size > 0
