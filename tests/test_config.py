import dataclasses

import pytest

from orchestrator.config import Config, DataConfig, UserError
from orchestrator.overrides import (
    config_digest,
    flatten,
    identity,
    known_keys,
    to_dict,
    unknown_key_message,
    with_overrides,
)


def test_overrides_change_a_copy_at_any_depth():
    base = Config(name="a")
    changed = with_overrides(
        base,
        {
            "seed": 3,
            "data.global_batch": 32,
            "train.early_stopping.patience": 2,
            "model.init_args.lr": 0.1,
            "model.init_args.head.width": 64,
        },
    )
    assert (changed.seed, changed.data.global_batch) == (3, 32)
    assert changed.train.early_stopping.patience == 2
    assert changed.model.init_args == {"lr": 0.1, "head": {"width": 64}}
    assert changed.name == "a"
    assert base == Config(name="a")


def test_an_override_replaces_a_section_by_null():
    changed = with_overrides(Config(), {"train.early_stopping": None})
    assert changed.train.early_stopping is None
    with pytest.raises(UserError, match=r"'train\.early_stopping\.patience' does not exist"):
        with_overrides(changed, {"train.early_stopping.patience": 2})


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("data.globl_batch", "data.global_batch"),
        ("global_batch", "data.global_batch"),
        ("train.num_workers", "scaling.num_workers"),
        ("sed", "seed"),
    ],
)
def test_an_override_of_nothing_names_the_nearest_key(path, nearest):
    with pytest.raises(UserError, match=f"config key '{path}' does not exist: did you mean"):
        with_overrides(Config(), {path: 1})
    assert f"did you mean {nearest!r}?" in unknown_key_message(path, [])


def test_a_key_like_no_other_gets_the_valid_ones():
    message = unknown_key_message("zzz", ["name", "seed"])
    assert message == "config key 'zzz' does not exist: valid keys are name, seed."


def test_known_keys_are_the_sections_and_their_fields():
    keys = known_keys()
    assert {"name", "train", "train.checkpoint.keep", "tune.space"} <= set(keys)
    assert len(keys) == len(set(keys))
    every = set(flatten(to_dict(Config()))) - {"tune"}
    assert every <= set(keys)


def test_sections_are_frozen_and_plain():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]
    assert to_dict(Config(data=DataConfig(std=(1.0, 2.0, 3.0))))["data"]["std"] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "change",
    [
        {"storage_path": "s3://elsewhere/runs"},
        {"scaling.num_workers": 7},
        {"scaling.gpus_per_worker": 1},
        {"data.max_micro_batch": 1},
        {"data.eval_batch": 1},
        {"data.decode_slots": 3},
        {"train.max_epochs": 200},
        {"train.max_failures": 0},
        {"train.checkpoint.every_steps": 5},
        {"train.early_stopping": None},
        {"train.early_stopping.patience": 3},
    ],
)
def test_what_may_change_on_resubmission_leaves_the_identity(change):
    base = Config(name="run")
    assert identity(with_overrides(base, change)) == identity(base)
    assert config_digest(with_overrides(base, change)) == config_digest(base)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"seed": 1},
        {"data.index": "elsewhere"},
        {"data.global_batch": 1},
        {"data.image_size": 1},
        {"data.flip": 0.0},
        {"data.window_chunks": 2},
        {"model.class_path": "a.B"},
        {"model.init_args.lr": 0.1},
        {"train.strategy": "zero1"},
        {"train.precision": "bf16"},
        {"train.gradient_clip_norm": 1.0},
    ],
)
def test_what_makes_a_run_this_run_is_its_identity(change):
    base = Config(name="run")
    changed = with_overrides(base, change)
    (key,) = change
    assert identity(changed)[key] == change[key]
    assert identity(changed) != identity(base)
    assert config_digest(changed) != config_digest(base)
