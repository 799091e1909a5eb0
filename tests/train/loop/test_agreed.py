"""What the workers agree on before they train, with worker 0 alone."""

import dataclasses
from typing import Any

import pytest
from numeric_modules import Plain

from orchestrator.config import (
    Config,
    DataConfig,
    ModelConfig,
    ScalingConfig,
    TrainConfig,
    UserError,
)
from orchestrator.train import memory_limits
from orchestrator.train.job import Job
from orchestrator.train.loop import training
from orchestrator.train.module import ImageClassifier
from orchestrator.train.saving.checkpoint import Manifest
from orchestrator.train.strategies import choose
from orchestrator.train.strategies.choice import Choice
from orchestrator.train.strategies.choose import DeviceMemory
from orchestrator.train.timing.startup import Startup

LEFT = Choice("auto", "the workers' GPUs decide")


def job(strategy: Choice = LEFT, **changes: Any) -> Job:
    config = Config(
        model=ModelConfig(init_args={"arch": "tiny_resnet"}),
        scaling=ScalingConfig(num_workers=8, gpus_per_worker=1),
    )
    config = dataclasses.replace(config, **changes)
    return Job(
        run="",
        config=config,
        strategy=strategy,
        lease="",
        share=1,
        may_grow=False,
        board=None,
        import_paths=[],
        startup=Startup(0.0),
    )


def manifest(strategy: str) -> Manifest:
    fields: dict[str, Any] = {f.name: None for f in dataclasses.fields(Manifest)}
    return Manifest(**{**fields, "step": 7, "strategy": strategy})


def test_the_first_workers_gpu_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(
        training, "broadcast_from_rank_zero", lambda mine: told.append(mine) or told[0]
    )
    monkeypatch.setattr(choose, "device_memory", lambda scaling: DeviceMemory(9_000_000, "a GPU"))
    for rank in (0, 1):
        agreed = training._with_strategy(job(LEFT), 3, None, rank)
        assert agreed.strategy.value.startswith("zero")
        assert "of 5.4 MB, 60% of a GPU" in agreed.strategy.reason
    # Plain words travel, and only from the first.
    assert [type(each) for each in told] == [tuple, type(None)]


def test_what_the_driver_or_a_checkpoint_says_is_kept() -> None:
    asked = Choice("zero2", "asked for")
    assert training._with_strategy(job(asked), 3, None, 1).strategy == asked
    resumed = training._with_strategy(job(LEFT), 3, manifest("zero1"), 0)
    assert str(resumed.strategy) == "zero1: as before the resume at step 7"


def test_only_our_own_module_is_told_how_long_the_run_is() -> None:
    ours, theirs = ImageClassifier(num_classes=3), Plain()
    theirs.total_steps = "theirs"
    for module in (ours, theirs):
        training._tell_length(module, 40)
    assert (ours.total_steps, theirs.total_steps) == (40, "theirs")


def test_a_module_that_optimizes_by_hand_must_hold_its_share_on_the_fewest_workers() -> None:
    by_hand = Plain("manual")
    data = DataConfig(global_batch=16, max_micro_batch=8)
    scaling = ScalingConfig(num_workers=(1, 4))
    enough = job(data=data, scaling=ScalingConfig(num_workers=(2, 4)))
    training._check_module(by_hand, enough)
    training._check_module(Plain(), job(data=data, scaling=scaling))
    short = job(data=data, scaling=scaling)
    with pytest.raises(
        UserError, match=r"on 1 workers that is 16 .* raise data.max_micro_batch to"
    ):
        training._check_module(by_hand, short)
    limited = dataclasses.replace(short, limits={memory_limits.MICRO_BATCH: 8})
    with pytest.raises(UserError, match=r"more ran out of memory, so raise scaling\.num_workers"):
        training._check_module(by_hand, limited)
    clipped = job(data=data, scaling=enough.config.scaling, train=TrainConfig(gradient_clip_norm=1))
    with pytest.raises(UserError, match=r"set train.gradient_clip_norm=1 to null"):
        training._check_module(by_hand, clipped)
