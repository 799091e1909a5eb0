from pathlib import Path

import pytest

from orchestrator import configfile
from orchestrator.config import Config, EarlyStoppingConfig, TuneConfig, UserError
from orchestrator.overrides import known_keys


def load(tmp_path: Path, text: str, *flags: str) -> Config:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return configfile.load(str(file), flags)


def refusal(tmp_path: Path, text: str, *flags: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *flags)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E5", 1e5), ("-2e+2", -200.0), ("1.5e-3", 1.5e-3), ("3.e2", 300.0)],
)
def test_a_number_with_an_exponent_is_a_number(text, value):
    parsed = configfile.parse_yaml(f"lr: {text}", source="x")["lr"]
    assert isinstance(parsed, float)
    assert parsed == value


def test_words_with_an_e_stay_words():
    assert configfile.parse_yaml("[1e, e3, 1e-x, abe3]", source="x") == ["1e", "e3", "1e-x", "abe3"]


def test_a_file_is_read_and_flags_come_over_it(tmp_path):
    config = load(
        tmp_path,
        "name: a\nseed: 1\ndata: {global_batch: 8}\nmodel: {init_args: {lr: 1e-3, arch: x}}\n",
        "--seed",
        "2",
        "--data.flip=0",
        "--model.init_args.lr",
        "2e-3",
        "--train.early_stopping.patience",
        "4",
        "--data.crop_scale",
        "[0.5, 1]",
    )
    assert (config.name, config.seed, config.data.global_batch) == ("a", 2, 8)
    assert config.data.flip == 0.0
    assert config.data.crop_scale == (0.5, 1.0)
    assert config.model.init_args == {"lr": 0.002, "arch": "x"}
    assert config.train.early_stopping == EarlyStoppingConfig(patience=4)


def test_null_switches_a_section_off_and_a_mapping_on(tmp_path):
    config = load(tmp_path, "train: {early_stopping: null}\ntune: {num_samples: 3}\n")
    assert config.train.early_stopping is None
    assert config.tune == TuneConfig(num_samples=3)


@pytest.mark.parametrize("flags", [(), ("--train.precision", "32")])
def test_precision_32_is_a_word_though_yaml_reads_a_number(tmp_path, flags):
    config = load(tmp_path, "train: {precision: 16}\n", *flags)
    assert config.train.precision == (flags[1] if flags else "16")


def test_without_a_file_the_flags_are_all():
    assert configfile.load(None, ["--name", "a"]) == Config(name="a")


def test_a_dumped_config_is_read_back_the_same(tmp_path):
    config = load(
        tmp_path,
        "name: a\ntrain: {precision: 32, early_stopping: null}\nmodel: {init_args: {lr: 1e-5}}\n"
        "tune: {space: {model.init_args.lr: {loguniform: [1e-5, 1e-1]}}}\n",
    )
    assert config.tune is not None
    assert config.tune.space == {"model.init_args.lr": {"loguniform": [1e-5, 0.1]}}
    assert load(tmp_path, configfile.dump(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {globl_batch: 3}", "'data.globl_batch' does not exist: did you mean 'data.global"),
        ("global_batch: 3", "'global_batch' does not exist: did you mean 'data.global_batch'?"),
        ("trian: {}", "config key 'trian' does not exist: did you mean 'train'?"),
        ("train: {early_stopping: {patiense: 1}}", "did you mean 'train.early_stopping.patience'?"),
        ("1: 2", "config key '1' does not exist: valid keys are name, storage_path"),
        ("data: {global_batch: many}", "'data.global_batch': input should be a valid integer"),
        ("data: {global_batch: many}", "but it is 'many'; change it"),
        ("data: {crop_scale: [0.1]}", "config key 'data.crop_scale.1': field required"),
        ("train: {strategy: fsdp}", "'train.strategy': input should be 'auto', 'ddp', 'zero1'"),
        ("train: 5", "config key 'train': input should be a dictionary"),
        ("seed: 1.5", "config key 'seed': input should be a valid integer"),
        ("- a", "must hold a YAML mapping such as `name: my-run`"),
        ("", "must hold a YAML mapping such as `name: my-run`"),
        ("name: [a", "config.yaml line 1 is not valid YAML: expected ',' or ']'"),
        ("name: a\n\tseed: 1", "config.yaml line 2 is not valid YAML: found character '\\t'"),
        ("name: !!python/object:os.system {}", "is not valid YAML: could not determine a constr"),
    ],
)
def test_a_wrong_file_gets_one_sentence(tmp_path, text, message):
    assert message in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sede", "1"), "config key 'sede' does not exist: did you mean 'seed'?"),
        (("--data.global_batch",), "--data.global_batch needs a value: --data.global_batch VALUE."),
        (("seed", "1"), "argument 'seed' is not of the form --section.field VALUE."),
        (("--data.index", "[a"), "--data.index line 1 is not valid YAML"),
        (("--data.global_batch", "x"), "config key 'data.global_batch': input should be a valid"),
    ],
)
def test_a_wrong_flag_gets_one_sentence(tmp_path, flags, message):
    assert message in refusal(tmp_path, "name: a", *flags)


def test_a_missing_file_is_named(tmp_path):
    missing = str(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=f"cannot read {missing}: there is no such file"):
        configfile.load(missing)


def test_help_lists_every_field_with_its_docstring():
    lines = configfile.help_text().splitlines()
    flags = [line.split()[0].removeprefix("--") for line in lines[::2]]
    sections = {key for key in known_keys() if any(k.startswith(f"{key}.") for k in known_keys())}
    assert flags == [key for key in known_keys() if key not in sections]
    assert all(line.strip().endswith((".", "}.")) and len(line) > 20 for line in lines[1::2])
    at = flags.index("data.global_batch")
    assert lines[2 * at] == "  --data.global_batch (default 256)"
    assert "whatever the number of workers" in lines[2 * at + 1]
