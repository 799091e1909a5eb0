"""Fixtures shared by all tests: image trees, an S3 server, a Ray cluster."""

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import ray
from faults import FaultProxy, serve_faults
from PIL import Image
from s3 import S3Server, environment, serve

from orchestrator import storage


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
