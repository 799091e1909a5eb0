"""`orchestrator plan`: a page about a run that is not started."""

import dataclasses
import json
from pathlib import Path

import pytest
import ray
import torch
from packed import write_packed

from orchestrator import cli, configfile
from orchestrator.run import append_event, open_run
from orchestrator.train import launch


def test_it_shows_memory_steps_and_the_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = write_packed(tmp_path / "data", train=75, val=12)
    (tmp_path / "run.yaml").write_text(
        f"name: planned\nstorage_path: {tmp_path / 'runs'}\n"
        f"data: {{index: {index.uri}, global_batch: 16, max_micro_batch: 4, image_size: 8}}\n"
        "train: {max_epochs: 2, strategy: auto}\nscaling: {num_workers: 2}\n"
    )
    assert cli.main(["plan", "--config", str(tmp_path / "run.yaml")]) == 0
    page = capsys.readouterr().out
    assert "75 training images in steps of 16 samples" in page
    assert "4.7 steps an epoch, 10 in 2 epochs" in page
    for row in ("| ddp ", "| zero1 ", "| zero2 ", "| zero3 ", "| 2 (this run) | 4 ", "| 16 "):
        assert row in page
    assert "Strategy ddp: ddp takes" in page
    assert "A checkpoint takes 3.7 MB: 1.2 MB of weights, 2.5 MB of optimizer states" in page
    assert "of pixels in the object store" in page
    # Offloaded, where gradients lie beside the states: those are not saved.
    offloaded = ["--train.offload_optimizer", "true", "--scaling.gpus_per_worker", "1"]
    assert cli.main(["plan", "--config", str(tmp_path / "run.yaml"), *offloaded]) == 0
    assert "0.6 MB of weights, 3.7 MB of optimizer states" in capsys.readouterr().out
    assert len(page.splitlines()) <= 40
    assert not ray.is_initialized()
    assert not (tmp_path / "runs").exists()


def test_it_says_what_only_the_workers_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    index = write_packed(tmp_path / "data", train=75, val=12)
    flags = ["--name", "x", "--storage_path", str(tmp_path), "--data.index", index.uri]
    gpus = ["--scaling.gpus_per_worker", "1", "--scaling.num_workers", "2"]
    assert cli.main(["plan", *flags, "--data.global_batch", "16", *gpus]) == 0
    page = capsys.readouterr().out
    assert "Strategy auto: the workers' GPUs decide: there is none here." in page
    assert "A checkpoint takes under ddp 3.7 MB" in page
    (row,) = (line for line in page.splitlines() if "(this run)" in line)
    assert [cell.strip() for cell in row.split("|")][-3:] == ["?", "?", ""]


def test_it_knows_a_run_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    index = write_packed(tmp_path / "data", train=75, val=12)
    part = {"index": "data", "global_batch": 16, "max_micro_batch": 4, "image_size": 8}
    assert Path(index.uri).resolve() == (tmp_path / "data").resolve()
    text = f"name: x\nstorage_path: {tmp_path / 'runs'}\ndata: {json.dumps(part)}\n"
    (tmp_path / "run.yaml").write_text(text)
    config = configfile.load(str(tmp_path / "run.yaml"))
    run = open_run(dataclasses.replace(config, data=launch.absolute(config.data)))
    fields = {"setting": "data.max_micro_batch", "asked": 4, "from": 4, "to": 2}
    append_event(run, "out_of_memory", **fields)
    assert cli.main(["plan", "--config", "run.yaml"]) == 0
    page = capsys.readouterr().out
    assert "data.max_micro_batch is held at 2: more ran out of memory" in page
    assert "| 1 (this run) | 2 " in page
    assert cli.main(["plan", "--config", "run.yaml", "--seed", "7"]) == 2
    assert "belongs to another config: seed was 0 and is now 7" in capsys.readouterr().err


def test_a_mistake_is_one_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = write_packed(tmp_path / "data", train=75, val=12)
    flags = ["--name", "x", "--data.index", index.uri, "--data.global_batch", "16"]
    offload = ["--train.strategy", "zero2", "--train.offload_optimizer", "true"]
    assert cli.main(["plan", *flags, *offload]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: train.offload_optimizer=true moves optimizer states")
    assert said.count("\n") == 1
