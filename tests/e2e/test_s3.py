"""From S3 to S3: pack, train, a killed driver, the same command again, evaluate; only `AWS_*`."""

import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from processes import Session, session, wait_until
from s3 import SECRET_KEY, S3Server
from sklearn.datasets import load_digits

from orchestrator import storage
from orchestrator.data.index import read_index, read_shards
from orchestrator.run import read_events, read_result
from orchestrator.train.saving import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

IMAGES = 300
EPOCHS = 2
CONFIG = Path(__file__).parents[2] / "jobs" / "digits.yaml"
STEP_S = 300  # generous: the machine may be busy
# Ray's agents on a node wait 60 s for a control store that died before they end.
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


@pytest.fixture
def user(s3: S3Server, tmp_path: Path) -> Iterator[Session]:
    with session(tmp_path, **s3.env) as made:
        yield made


def upload_digits(root: str) -> set[str]:
    """Write real images as an ImageFolder tree; return their ids."""
    digits = load_digits()
    ids = set()
    for i in range(IMAGES):
        buffer = io.BytesIO()
        pixels = (digits.images[i] * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        ids.add(name := f"{digits.target[i]}/{i:04d}.png")
        storage.write_atomic(storage.join(root, name), buffer.getvalue())
    return ids


def ids_in(uri: str) -> list[str]:
    with storage.open_input(uri) as file:
        ids: list[str] = pq.read_table(file, columns=["id"])["id"].to_pylist()
        return ids


def succeed(user: Session, *command: str) -> str:
    done = user.run(*command, timeout_s=STEP_S)
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


def at_work(user: Session) -> list[str]:
    left = user.left_running().values()
    return [command for command in left if not command.startswith(AGENTS)]


def kill_inside_an_epoch(user: Session, command: list[str], run: str) -> int:
    """Kill the driver once a checkpoint is committed; return the step it can go on from."""
    checkpoints = storage.join(run, "checkpoints")

    def is_committed() -> bool:
        assert driver.poll() is None, log.read_text()
        names = [entry.name for entry in storage.list_tree(checkpoints)]
        return any(name.endswith(checkpoint.MANIFEST_FILE) for name in names)

    log = user.folder / "killed.log"
    with user.running(*command, log=log) as driver:
        wait_until(lambda: len(at_work(user)) > 3, timeout_s=STEP_S, otherwise="no Ray started")
        wait_until(is_committed, timeout_s=STEP_S, otherwise="no checkpoint was committed")
        driver.kill()
        driver.wait()
        wait_until(lambda: not at_work(user), timeout_s=60, otherwise=user.left_running)
    newest = checkpoint.list_manifests(run)[-1]
    assert newest.metrics == {}, "this checkpoint was not taken inside an epoch"
    return newest.step


def test_a_killed_run_in_a_bucket_goes_on_and_loses_nothing(user: Session, s3: S3Server) -> None:
    bucket = s3.make_bucket("from-s3-to-s3")
    ids = upload_digits(f"{bucket}/digits")
    shards, run = f"{bucket}/shards", f"{bucket}/runs/digits"
    source = ["--source", f"{bucket}/digits", "--out", shards]
    packed = succeed(user, "orchestrator", "pack", *source, "--val-fraction", "0.2")
    assert f"packed {shards}: 10 classes" in packed
    index = read_index(shards)
    by_split = {"train": set[str](), "val": set[str]()}
    for shard in read_shards(index):
        by_split[shard.split].update(ids_in(storage.join(shards, shard.path)))
    assert by_split["train"] | by_split["val"] == ids
    assert index.splits["val"].samples == len(by_split["val"])

    settings = {
        "storage_path": f"{bucket}/runs",
        "data.index": shards,
        "data.global_batch": "4",
        "data.audit": "true",
        "train.max_epochs": str(EPOCHS),
        "train.checkpoint.every_steps": "2",
    }
    flags = [f"--{key}={value}" for key, value in settings.items()]
    command = ["orchestrator", "train", "--config", str(CONFIG), *flags]
    step = kill_inside_an_epoch(user, command, run)
    assert "report: s3://from-s3-to-s3/runs/digits/report.html" in succeed(user, *command)

    starts = [event["step"] for event in read_events(run) if event["event"] == "training"]
    assert starts == [0, step]
    assert step > 0
    result = read_result(run)
    assert result is not None
    assert result["stop_reason"] == "max_epochs"
    assert result["samples_seen"] == EPOCHS * len(by_split["train"])
    assert_exactly_once(run, by_split["train"])

    succeed(user, "orchestrator", "evaluate", "--run", run)
    evaluation = json.loads(storage.read_bytes(f"{run}/evaluation.json"))
    assert evaluation["samples"] == len(by_split["val"])
    assert sum(entry["samples"] for entry in evaluation["classes"]) == len(by_split["val"])
    assert_complete_and_without_secrets(run)
    wait_until(lambda: not user.left_running(), timeout_s=90, otherwise=user.left_running)


def assert_exactly_once(run: str, ids: set[str]) -> None:
    counts: Counter[tuple[int, str]] = Counter()
    for entry in storage.list_tree(f"{run}/samples"):
        with storage.open_input(f"{run}/samples/{entry.name}") as file:
            counts.update((row["epoch"], row["id"]) for row in pq.read_table(file).to_pylist())
    assert set(counts.values()) == {1}
    assert counts.keys() == {(epoch, i) for epoch in range(EPOCHS) for i in ids}


def assert_complete_and_without_secrets(run: str) -> None:
    names = {entry.name for entry in storage.list_tree(run)}
    promised = {"config.yaml", "events.jsonl", "metrics.parquet", "result.json", "report.md"}
    assert promised | {"report.html", "evaluation.json"} <= names
    assert any(name.startswith("tensorboard/events.out.tfevents") for name in names)
    for name in names:
        assert SECRET_KEY.encode() not in storage.read_bytes(f"{run}/{name}"), name
