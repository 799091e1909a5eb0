"""Networks by name: ours, torchvision's, timm's, or one sentence."""

import sys

import pytest
import torch

from orchestrator.config import UserError
from orchestrator.train.networks import build_network, tiny_resnet


@pytest.mark.parametrize("side", [8, 16, 32])
def test_tiny_resnet_is_small_and_takes_tiny_images(side: int) -> None:
    network = tiny_resnet(7)
    assert network(torch.randn(2, 3, side, side)).shape == (2, 7)
    assert 200_000 < sum(p.numel() for p in network.parameters()) < 700_000


def test_tiny_resnet_sees_each_sample_alone() -> None:
    torch.manual_seed(0)
    network, images = tiny_resnet(5), torch.randn(6, 3, 16, 16)
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(network(images), alone)


@pytest.mark.parametrize("arch", ["resnet18", "googlenet", "resnet10t"])  # the last is timm's alone
def test_models_of_torchvision_and_timm_by_name(arch: str) -> None:
    logits = build_network(arch, 3)(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 3)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"arch='resnet19' .* did you mean .*resnet18"):
        build_network("resnet19", 3)
    with pytest.raises(UserError, match=r"is no model of torchvision or timm: e\.g\."):
        build_network("?!", 3)


def test_without_either_package_the_remedy_is_to_install_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package in ("torchvision.models", "timm"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it raises ImportError
    with pytest.raises(UserError, match="pip install torchvision timm"):
        build_network("resnet18", 3)
    assert build_network("tiny_resnet", 3) is not None
