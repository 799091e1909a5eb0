"""What is found before a start's waits begin, and what these leave behind if they were in vain."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from packed import write_packed
from saves import make_manifest

from orchestrator.config import Config, DataConfig, ModelConfig
from orchestrator.run import open_run
from orchestrator.train.saving import checkpoint

# Prepares a start in a process of its own; prints its mistake, and what it has begun to wait for.
PREPARE = """
import json, pathlib, sys
from orchestrator import configfile
from orchestrator.config import UserError
from orchestrator.train import ahead
import ray
config, said = configfile.load(sys.argv[1], []), ""
try:
    with ahead.prepared(config, verbose=False):
        pass
except UserError as error:
    said = str(error)
print(json.dumps({"said": said, "torch": "torch" in sys.modules, "ray": ray.is_initialized()}))
"""


def prepare(tmp_path: Path, config: Config, **changes: Any) -> dict[str, Any]:
    data = {"index": config.data.index, "global_batch": 8, **changes.pop("data", {})}
    path = tmp_path / "config.json"
    model = {"class_path": config.model.class_path}
    path.write_text(
        json.dumps(
            {
                "name": config.name,
                "storage_path": config.storage_path,
                "data": data,
                "model": model,
                **changes,
            }
        )
    )
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-c", PREPARE, str(path)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=env, cwd=tmp_path
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(
        name="run",
        storage_path=str(tmp_path),
        data=DataConfig(
            index=write_packed(tmp_path / "data", train=40, val=10).uri, global_batch=8
        ),
        model=ModelConfig(class_path="modules.UserModule"),
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"max_epochs": 0}}, "train.max_epochs=0 must be at least 1"),
        ({"data": {"index": "nowhere"}}, "nowhere holds no INDEX.json"),
        ({"seed": 3}, "run belongs to another config: seed was 0 and is now 3"),
    ],
)
def test_what_needs_no_library_is_said_before_any_wait(
    tmp_path: Path, config: Config, changes: dict[str, Any], said: str
) -> None:
    if "seed" in changes:
        open_run(config)
    found = prepare(tmp_path, config, **changes)
    assert said in found["said"]
    assert not found["torch"]
    assert not found["ray"]


@pytest.mark.parametrize("index", ["{root}/data", "./data"])
def test_a_run_that_is_finished_starts_nothing(tmp_path: Path, config: Config, index: str) -> None:
    checkpoint.commit(open_run(config), make_manifest(5, done="converged"))
    found = prepare(tmp_path, config, data={"index": index.format(root=tmp_path)})
    assert found == {"said": "", "torch": False, "ray": False}


@pytest.mark.slow
def test_a_mistake_in_the_model_ends_the_ray_that_started_beside(
    tmp_path: Path, config: Config
) -> None:
    flags = ["--data.index", config.data.index, "--model.class_path", "modules.UserModul"]
    flags += ["--name", "run", "--data.global_batch", "8"]
    start = "import sys; from orchestrator.cli import main; sys.exit(main())"
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    env["PYTHONPATH"] = str(Path(__file__).parent)
    with subprocess.Popen(
        [sys.executable, "-c", start, "train", *flags, "--storage_path", str(tmp_path / "runs")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    ) as process:
        begun: dict[psutil.Process, str] = {}
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(process.pid).children(recursive=True)
                begun |= {child: child.name() for child in children}
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        out, errors = process.communicate()
    assert process.returncode == 2, errors
    assert out == ""
    assert "did you mean modules.UserModule?" in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
    assert "raylet" in begun.values()
    _, left = psutil.wait_procs(begun, timeout=20)
    assert left == []
