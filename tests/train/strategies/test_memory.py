"""The arithmetic of what workers hold, against the numbers of the ZeRO paper."""

import pytest

from orchestrator.train.strategies.memory import (
    BUCKET,
    STRATEGIES,
    ModelSize,
    buffer_settings,
    in_words,
    need,
)

# One matrix of 7.5 billion weights: figure 1 of the paper, with N = 64 and K = 12.
BIG = ModelSize.of([(7_500_000_000, True)])
SMALL = ModelSize.of([(300_000, True), (50_000, True), (1_000_000, False)], buffer_bytes=400)


@pytest.mark.parametrize(
    ("strategy", "gigabytes"), [("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9)]
)
def test_figure_1_of_the_paper(strategy: str, gigabytes: float) -> None:
    found = need(BIG, strategy, precision="bf16", num_workers=64)
    assert found.states / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_ddp_holds_everything_in_fp32_at_any_precision() -> None:
    for precision in ("32", "bf16"):
        found = need(SMALL, "ddp", precision=precision, num_workers=8)
        assert found.parameters == 4 * 1_350_000 + 400
        assert found.gradients == 4 * 350_000
        assert found.optimizer == 8 * 350_000


def test_frozen_weights_have_neither_gradients_nor_states() -> None:
    found = need(SMALL, "zero2", precision="32", num_workers=2)
    assert found.parameters == 4 * 1_350_000 + 400
    assert found.gradients == 4 * 350_000 / 2
    assert found.optimizer == 12 * 350_000 / 2


def test_zero3_keeps_small_parameters_whole() -> None:
    found = need(SMALL, "zero3", precision="bf16", num_workers=2)
    assert found.parameters == 2 * (50_000 + 1_350_000 / 2) + 400


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_lies_on_the_node(stage: int) -> None:
    strategy = f"zero{stage}"
    # In many layers: the largest gradient travels through a buffer.
    size = ModelSize.of([(4_000_000, True)] * 400)
    kept = need(size, strategy, precision="bf16", num_workers=64)
    moved = need(size, strategy, precision="bf16", num_workers=64, offload=True)
    assert moved.optimizer == 0
    assert moved.host > kept.optimizer
    assert moved.total < kept.total


def test_each_stage_holds_less_than_the_one_before() -> None:
    # Layers as large as a big vision transformer's.
    size = ModelSize.of([(4_000_000, True)] * 400)
    totals = [need(size, s, precision="32", num_workers=8).total for s in STRATEGIES]
    assert totals == sorted(totals, reverse=True)


def test_buffers_are_no_larger_than_the_model() -> None:
    assert buffer_settings([10, 20])["reduce_bucket_size"] == 30
    assert buffer_settings([10**9])["reduce_bucket_size"] == BUCKET
    assert buffer_settings([10**9])["stage3_max_live_parameters"] == 10**9
    assert buffer_settings([7])["allgather_bucket_size"] % 2 == 0


def test_bytes_read_well() -> None:
    assert [in_words(1.5e6), in_words(2_345e6)] == ["1.5 MB", "2.35 GB"]
