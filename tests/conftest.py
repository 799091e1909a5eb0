"""Fixtures shared by all tests: image trees, an S3 server, a Ray cluster, refused commands."""

import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

# Before NumPy, SciPy and OpenCV start a thread each of their own OpenBLAS, which tests do not need:
# SciPy's ended a run of 2,029 passed tests by SIGSEGV while the process exited (2026-11-30).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest
import ray
from faults import FaultProxy, serve_faults
from PIL import Image
from s3 import S3Server, environment, serve

from orchestrator import storage
from orchestrator.cli import main

CONFIG = """
name: first
storage_path: {root}/runs
data: {{index: {root}/data, global_batch: 8, image_size: 8}}
model: {{init_args: {{arch: tiny_resnet}}}}
train: {{max_epochs: 1}}
"""
Refused = Callable[..., None]


def encode_png(seed: int, *, side: int = 8) -> bytes:
    """Return a small grey PNG whose pixels depend on the seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tree(root: str, images_of_class: Mapping[str, int]) -> dict[str, bytes]:
    """Write an ImageFolder tree (a path or an S3 URI); return every image's bytes by its id."""
    names = [f"{name}/{i:05d}.png" for name, n in images_of_class.items() for i in range(n)]
    files = {name: encode_png(seed) for seed, name in enumerate(names)}
    for name, content in files.items():
        storage.write_atomic(storage.join(root, name), content)
    return files


@pytest.fixture
def make_tree(tmp_path: Path) -> Callable[..., tuple[str, dict[str, bytes]]]:
    """Return a function that writes a tree: make_tree(cat=3, dog=2) -> (root, bytes by id)."""

    def make(**images_of_class: int) -> tuple[str, dict[str, bytes]]:
        root = str(tmp_path / "images")
        return root, write_tree(root, images_of_class)

    return make


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """Start an S3 server; from then on this process's `AWS_*` variables name it.

    A Ray cluster's workers see them only if the cluster starts later: use `ray_with_s3`.
    """
    with serve() as server, environment(server.env):
        yield server


@pytest.fixture
def faulty_s3(s3: S3Server) -> Iterator[FaultProxy]:
    """Put a fault proxy before the S3 server; this process's `AWS_*` variables name the proxy.

    For a Ray cluster: start it inside `serve_faults(s3)` and `environment(proxy.env)`.
    """
    with serve_faults(s3) as proxy, environment(proxy.env):
        yield proxy


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """Start a Ray cluster of two CPUs for the tests of one module."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def ray_with_s3(s3: S3Server, request: pytest.FixtureRequest) -> S3Server:
    """Start a Ray cluster whose workers reach the S3 server."""
    request.getfixturevalue("ray_cluster")
    return s3


@pytest.fixture
def config(tmp_path: Path) -> str:
    """Return a config file that would train; tests break one thing of it."""
    from packed import write_packed  # it imports encode_png from here

    write_packed(tmp_path / "data")
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(root=tmp_path))
    return str(file)


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Return a folder's files and folders, but for an empty one where runs would lie."""
    inside = {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}
    return {p: content for p, content in inside.items() if p != folder / "runs"}


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Return a function that runs a command and checks how it is refused."""

    def check(*argv: str, match: str) -> None:
        before = contents(tmp_path)
        capfd.readouterr()
        assert main(argv) == 2
        out, err = capfd.readouterr()
        assert re.fullmatch(r"error: .*[.?]\n", err), err
        assert re.search(match, err), err
        assert out == ""
        assert contents(tmp_path) == before

    return check
