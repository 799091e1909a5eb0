"""A cluster on loopback with token auth: `ray job submit`, its logs, the finished run folder."""

import dataclasses
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packed import write_packed
from processes import Session, session, wait_until
from s3 import free_ports

from orchestrator.run import read_events, read_result

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
STEP_S = 300  # generous: the machine may be busy
AUTH = {"RAY_AUTH_MODE": "token"}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A running head node and a user with its token, in a folder with what a job needs."""

    user: Session
    address: str

    def submit(self, *job: str, **env: str) -> tuple[int, str]:
        """Submit a command and follow it to its end; return the exit status and all output."""
        options = ["--address", self.address, "--working-dir", "."]
        done = self.user.run(
            "ray", "job", "submit", *options, "--", *job, timeout_s=STEP_S, **(AUTH | env)
        )
        return done.returncode, done.stdout

    def jobs(self) -> str:
        """Return what `ray job list` prints."""
        listed = self.user.run("ray", "job", "list", "--address", self.address, timeout_s=60)
        assert listed.returncode == 0, listed.stdout
        return listed.stdout


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    names = ["port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"]
    names += ["node-manager-port", "object-manager-port", "runtime-env-agent-port"]
    names += ["metrics-export-port", "ray-client-server-port"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    options = [f"--{name}={port}" for name, port in ports.items()]
    # 0: any free port. A path of Ray's sockets holds at most 107 characters, so not `tmp_path`.
    options += ["--min-worker-port=0", "--max-worker-port=0", "--num-cpus=3"]
    options += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        session(tmp_path, **AUTH, RAY_AUTH_TOKEN=secrets.token_hex(16)) as user,
    ):
        command = ["ray", "start", "--head", "--block", "--include-dashboard=true", *options]
        log = tmp_path / "head.log"
        with user.running(*command, f"--temp-dir={folder}", log=log) as head:
            made = Cluster(user, f"http://127.0.0.1:{ports['dashboard-port']}")

            def answers() -> bool:
                assert head.poll() is None, log.read_text()
                listing = ("ray", "job", "list", "--address", made.address)
                return user.run(*listing, timeout_s=60).returncode == 0

            wait_until(answers, timeout_s=STEP_S, otherwise="no dashboard answers")
            yield made


def test_a_submitted_job_trains_and_none_gets_in_without_the_token(
    cluster: Cluster, tmp_path: Path
) -> None:
    for name in ("jobs", "orchestrator"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    write_packed(tmp_path / "data", train=160, val=40)
    settings = {
        "storage_path": f"{tmp_path}/runs",
        "data.index": f"{tmp_path}/data",
        "data.global_batch": "16",
        "train.max_epochs": "2",
    }
    flags = [f"--{key}={value}" for key, value in settings.items()]
    job = ["python", "jobs/train.py", "--config", "jobs/digits.yaml", *flags]

    for wrong in ({"RAY_AUTH_TOKEN": ""}, {"RAY_AUTH_TOKEN": secrets.token_hex(16)}):
        status, output = cluster.submit(*job, **wrong)
        assert status != 0, output
        assert "token" in output.lower(), output
    assert not (tmp_path / "runs").exists()
    assert "submission_id" not in cluster.jobs()

    status, output = cluster.submit(*job, "--scaling.num_workers=9")
    assert status != 0, output
    assert "scaling.num_workers=9 needs 9 CPUs but this cluster has 3" in output, output
    assert not any(path.is_file() for path in (tmp_path / "runs").rglob("*"))

    status, output = cluster.submit(*job)
    assert status == 0, output
    assert "succeeded" in output
    run = f"{tmp_path}/runs/digits"
    assert f"report: {run}/report.html" in output, "the job's own lines are followed"
    assert "epoch 2: val_loss" in output
    assert cluster.jobs().count("submission_id") == 2
    result = read_result(run)
    assert result is not None
    assert (result["stop_reason"], result["samples_seen"]) == ("max_epochs", 320)
    assert Path(run, "report.html").stat().st_size > 0
    assert [event["workers"] for event in read_events(run) if event["event"] == "training"] == [2]
