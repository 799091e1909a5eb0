"""What Prometheus and the loggers see of a real run: Ray's endpoint is scraped while it trains."""

import csv
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from packed import write_packed

from orchestrator.config import CheckpointConfig, Config, DataConfig, ModelConfig, TrainConfig
from orchestrator.run import read_events
from orchestrator.train.launch import RunResult, fit
from orchestrator.train.logs.meters import Meters

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
STEPS = 24
LINE = re.compile(r"^(?:ray_)?(orchestrator_\w+)\{([^}]*)\} (\S+)$", re.MULTILINE)


class Scraper(threading.Thread):
    """Reads the node's endpoint, as Prometheus does, and keeps each series' newest value."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._uri = f"http://127.0.0.1:{port}/metrics"
        self._done = threading.Event()
        self.found: dict[str, tuple[str, float]] = {}

    def run(self) -> None:
        while not self._done.wait(0.5):
            with urllib.request.urlopen(self._uri, timeout=10) as answer:
                text = answer.read().decode()
            for name, tags, value in LINE.findall(text):
                self.found[name] = (tags, float(value))

    def stop(self) -> None:
        self._done.set()
        self.join()


@pytest.fixture(scope="module")
def metered() -> Iterator[int]:
    """Start a cluster whose processes hand their metrics over twice a second, not every 10 s."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 500},
    )
    yield int(ray.nodes()[0]["MetricsExportPort"])
    ray.shutdown()


@pytest.fixture(scope="module")
def run(
    metered: int, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunResult, dict[str, tuple[str, float]]]:
    folder = tmp_path_factory.mktemp("reported")
    index = write_packed(folder / "data", train=60, val=8)
    config = Config(
        name="metered",
        storage_path=str(folder),
        data=DataConfig(index=index.uri, global_batch=10, eval_batch=4, image_size=8),
        model=ModelConfig(class_path="modules.Dawdles"),
        train=TrainConfig(
            max_epochs=4,
            precision="32",
            early_stopping=None,
            checkpoint=CheckpointConfig(every_steps=5),
            loggers=[{"class_path": "pytorch_lightning.loggers.CSVLogger"}],
        ),
    )
    scraper = Scraper(metered)
    scraper.start()
    result = fit(config)
    scraper.stop()
    return result, scraper.found


def test_prometheus_sees_the_run(run: tuple[RunResult, dict[str, tuple[str, float]]]) -> None:
    _, found = run
    values = {name.removeprefix("orchestrator_"): value for name, (_, value) in found.items()}
    assert 0 < values["step"] <= STEPS
    assert values["samples_seen"] == 10 * values["step"]
    assert values["images_per_s"] > 0
    assert 0 <= values["data_wait_share"] <= 1
    assert values["train_loss"] > 0
    assert values["validation"] > 0
    assert values["restarts"] == values["bad_images"] == values["checkpoint_failures"] == 0
    assert values["checkpoint_save_seconds"] > 0
    assert 'run="metered"' in found["orchestrator_step"][0]
    assert 'rank="0"' in found["orchestrator_data_wait_share"][0]
    assert 'metric="val_loss"' in found["orchestrator_validation"][0]


def test_loggers_see_what_the_run_keeps(
    run: tuple[RunResult, dict[str, tuple[str, float]]],
) -> None:
    folder = Path(run[0].run)
    (path,) = folder.glob("loggers/**/metrics.csv")
    rows = list(csv.DictReader(path.open()))
    logged = {int(row["step"]): float(row["train_loss"]) for row in rows if row["train_loss"]}
    kept = pq.read_table(folder / "metrics.parquet").to_pylist()
    assert logged == pytest.approx(
        {m["step"]: m["value"] for m in kept if m["name"] == "train_loss"}
    )
    samples = {int(row["step"]): float(row["samples"]) for row in rows if row["samples"]}
    assert samples == {step: 10 * step for step in logged}
    validated = {int(row["step"]): float(row["val_loss"]) for row in rows if row["val_loss"]}
    assert validated == pytest.approx(
        {m["step"]: m["value"] for m in kept if m["name"] == "val_loss"}
    )
    hparams = path.with_name("hparams.yaml").read_text()
    assert "data.global_batch: 10" in hparams
    assert list(folder.glob("tensorboard/events*"))


def test_a_run_says_where_its_start_went(
    run: tuple[RunResult, dict[str, tuple[str, float]]],
) -> None:
    (event,) = [each for each in read_events(run[0].run) if each["event"] == "startup"]
    assert not event["restart"]
    assert {"workers", "reading", "worker imports", "first batch"} <= event["seconds"].keys()
    assert sum(event["seconds"].values()) == pytest.approx(event["total_s"], abs=0.05)
    assert all(seconds >= 0 for seconds in event["seconds"].values())


def test_setting_meters_costs_microseconds(metered: int) -> None:
    meters = Meters("cost", rank=0)
    values: dict[str, float | None] = {"step": 1.0, "images_per_s": 2.0, "train_loss": float("nan")}
    began = time.process_time()
    for _ in range(1_000):
        meters.set(values)
        meters.set_wait_share(0.5)
    assert (time.process_time() - began) / 1_000 < 1e-3
