import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator import run
from orchestrator.config import Config, DataConfig, ScalingConfig, UserError


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(name="group/first", storage_path=str(tmp_path / "runs"))


def test_a_new_run_is_a_folder_with_its_config(config, tmp_path):
    location = run.open_run(config)
    assert location == run.run_uri(config) == f"{tmp_path}/runs/group/first"
    assert [p.name for p in Path(location).iterdir()] == ["config.yaml"]
    assert run.read_config(location) == config


def test_checking_writes_nothing(config, tmp_path):
    run.check_same_run(config)
    assert list(tmp_path.iterdir()) == []


def test_the_same_run_is_found_again_with_what_may_change(config):
    location = run.open_run(config)
    more = dataclasses.replace(config, scaling=ScalingConfig(num_workers=2))
    assert run.open_run(more) == location
    assert run.read_config(location) == more


def test_a_folder_of_another_config_is_refused_and_kept(config):
    location = run.open_run(config)
    before = Path(location, "config.yaml").read_bytes()
    other = dataclasses.replace(config, seed=1, data=DataConfig(global_batch=8))
    for action in (run.open_run, run.check_same_run):
        with pytest.raises(UserError) as caught:
            action(other)
        assert str(caught.value) == (
            f"{location} belongs to another config: data.global_batch was 256 and is now 8 (and 1 "
            "more); give this run another --name, or take the change back."
        )
    assert Path(location, "config.yaml").read_bytes() == before


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.yaml, so it is no run; check --run\."):
        run.read_config(str(tmp_path))


def test_events_come_back_in_order(config):
    location = run.open_run(config)
    assert run.read_events(location) == []
    run.append_event(location, "submitted", workers=2)
    run.append_event(location, "training", step=7)
    events = run.read_events(location)
    assert [event["event"] for event in events] == ["submitted", "training"]
    assert events[1]["step"] == 7
    assert events[0]["time"] <= events[1]["time"]
    assert all(event["time"].endswith("+00:00") for event in events)


@pytest.mark.parametrize("torn", ['{"time": "2026', '{"event": "a"}', '{"event": {"b": 1}'])
def test_a_torn_last_line_is_left_out(config, torn):
    location = run.open_run(config)
    run.append_event(location, "submitted")
    with Path(location, "events.jsonl").open("a") as file:
        file.write(torn)
    assert [event["event"] for event in run.read_events(location)] == ["submitted"]


def test_events_after_a_torn_line_are_read(config):
    location = run.open_run(config)
    run.append_event(location, "submitted")
    with Path(location, "events.jsonl").open("a") as file:
        file.write('{"time": {}')
    run.append_event(location, "training", step=1)
    run.append_event(location, "training", step=2)
    assert [event.get("step") for event in run.read_events(location)] == [None, 1, 2]


@pytest.mark.parametrize(
    ("before", "after"),
    [('"event"', '"evant"'), ('"step"', '"stap"'), ('"time": "2', '"time": "r'), ("{", "[")],
)
def test_events_with_a_flipped_byte_are_left_out_and_counted(config, caplog, before, after):
    location = run.open_run(config)
    run.append_event(location, "submitted")
    run.append_event(location, "failure", error="gone", cause="process", step=3)
    path = Path(location, "events.jsonl")
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{second.replace(before, after, 1)}\n")
    assert [event["event"] for event in run.read_events(location)] == ["submitted"]
    assert run.failures_since_submission(location) == []
    assert "events.jsonl: 1 damaged lines are left out" in caplog.text


def test_a_result_says_that_the_run_ended(config):
    location = run.open_run(config)
    assert run.read_result(location) is None
    run.write_result(location, {"steps": 3, "best": {"val_loss": 0.5}})
    assert run.read_result(location) == {"steps": 3, "best": {"val_loss": 0.5}}
    assert json.loads(Path(location, "result.json").read_text())["steps"] == 3


@pytest.mark.slow
def test_a_run_in_a_bucket_keeps_its_events(s3):
    bucket = s3.make_bucket("run-tests")
    config = Config(name="first", storage_path=f"{bucket}/runs")
    location = run.open_run(config)
    assert location == "s3://run-tests/runs/first"
    run.append_event(location, "submitted")
    run.append_event(location, "training", step=3)
    assert [event["event"] for event in run.read_events(location)] == ["submitted", "training"]
    with pytest.raises(UserError, match="seed was 0 and is now 1; give this run another --name"):
        run.open_run(dataclasses.replace(config, seed=1))


@pytest.mark.slow
def test_of_several_writers_to_a_bucket_none_loses_an_event(s3):
    location = f"{s3.make_bucket('run-tests')}/runs/many"

    def write(writer: int) -> None:
        for number in range(5):
            run.append_event(location, "said", writer=writer, number=number)

    with ThreadPoolExecutor(4) as writers:
        list(writers.map(write, range(4)))
    said = [(event["writer"], event["number"]) for event in run.read_events(location)]
    assert sorted(said) == [(writer, number) for writer in range(4) for number in range(5)]
    assert [number for writer, number in said if writer == 0] == list(range(5))
