"""Every entry script and example config parses and is checked as far as it can be without data."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator import cli, configfile
from orchestrator.config import UserError
from orchestrator.train import preflight

ROOT = Path(__file__).resolve().parents[1]
# The others are what the benchmarks share.
SCRIPTS = [p for p in sorted((ROOT / "jobs").glob("*.py")) if "__main__" in p.read_text()]
CONFIGS = sorted((ROOT / "jobs").glob("*.yaml"))


def test_every_command_has_its_script() -> None:
    assert set(cli.COMMANDS) <= {script.stem for script in SCRIPTS}


def ask(script: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), "--help"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def answers() -> dict[Path, subprocess.CompletedProcess[str]]:
    """What every script says for --help: as many at once as there are CPUs."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(SCRIPTS, pool.map(ask, SCRIPTS), strict=True))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_shows_its_help(
    answers: dict[Path, subprocess.CompletedProcess[str]], script: Path
) -> None:
    done = answers[script]
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_an_example_config_is_whole(path: Path) -> None:
    config = configfile.load(str(path))
    preflight.check_config(config)
    assert configfile.from_dict(configfile.parse_yaml(configfile.dump(config), source="")) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_an_example_config_dry_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--config", str(path), "--print_config"]) == 0
    printed = configfile.parse_yaml(capsys.readouterr().out, source="printed")
    assert configfile.from_dict(printed) == configfile.load(str(path))


def test_a_config_is_checked_before_its_data_is_looked_for() -> None:
    config = configfile.load(str(ROOT / "jobs" / "digits.yaml"), ["--data.global_batch", "0"])
    with pytest.raises(UserError, match=r"data\.global_batch=0 must be at least 1"):
        preflight.check_config(config)
