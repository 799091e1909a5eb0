"""What bad input gets: one sentence, exit code 2, no stack trace, and nothing written."""

import dataclasses
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import Refused
from packed import write_packed
from s3 import environment, free_ports

from orchestrator import configfile, run
from orchestrator.cli import COMMANDS, main
from orchestrator.data.index import read_index, read_shards, write_index


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ("--data.global_batch 0", r"data\.global_batch=0 must be at least 1; raise it\."),
        ("--data.global_batch 41", r"=41 is larger than the 40 training images of .*/data; lower"),
        (
            "--data.global_batch 2 --scaling.num_workers 3",
            r"data\.global_batch=2 must be at least scaling\.num_workers=3; raise it or lower that",
        ),
        ("--scaling.num_workers 0", r"scaling\.num_workers=0 must be at least 1; raise it\."),
        ("--scaling.num_workers 11 --data.global_batch 11", r"=11 is more than the 10 validation"),
        ("--scaling.cpus_per_worker -1", r"scaling\.cpus_per_worker=-1(\.0)? must be above 0"),
        ("--train.checkpoint.every_steps 0", r"every_steps=0 must be at least 1; raise it\."),
        ("--train.early_stopping.patience -1", r"patience=-1 must be at least 1; raise it\."),
        ("--data.globl_batch 8", r"'data\.globl_batch' does not exist: did you mean 'data\.glob"),
        ("--global_batch=8", r"'global_batch' does not exist: did you mean 'data\.global_batch'\?"),
        ("--data.global_batch many", r"'data\.global_batch': input should be a valid integer.*'ma"),
        ("--train.precision 64", r"'train\.precision': input should be 'auto', '32'.*64; change"),
        ("--data.global_batch", r"--data\.global_batch needs a value: --data\.global_batch VALUE"),
        ("data.global_batch 8", r"argument 'data\.global_batch' is not of the form --section\.fi"),
        ("--data.index '\"\"'", r"data\.index='' must name what `orchestrator pack --out` wrote\."),
        ("--data.index /no/such/place", r"/no/such/place holds no INDEX\.json, .*run `orch"),
        ("--data.index ftp://h/x", r"ftp://h/x: the scheme 'ftp' is not supported; use s3://, gs"),
        ("--name ../first", r"name='\.\./first' must be a folder name; choose one such as my-run"),
        ("--model.class_path no.such.Net", r"'no\.such\.Net' does not import \(No module named"),
        ("--model.class_path .rel.Net", r"'\.rel\.Net' does not import \(TypeError: .*check the"),
        ("--model.class_path torch.nn.Linea", r"names no class: did you mean torch\.nn\.Linear\?"),
        ("--model.class_path torch.nn.Linear", r"is no LightningModule of .*derive it from pytor"),
        ("--model.init_args.archh x", r"model\.init_args\.archh: .* no such argument; did you mea"),
        ("--model.init_args.lr fast", r"model\.init_args=.*'fast'.* refuses them \(TypeError: .*"),
        ("--model.init_args.arch resnet1777", r"arch='resnet1777' is no model of .*did you mean"),
        ("--model.init_args [1]", r"'model\.init_args': input should be a valid dictionary.*\[1\]"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(
    config: str, refused: Refused, flags: str, match: str
) -> None:
    refused("train", "--config", config, *shlex.split(flags), match=match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("data: {globl_batch: 8}", r"'data\.globl_batch' does not exist: did you mean 'data\.gl"),
        ("data: {global_batch: [8]}", r"'data\.global_batch': input should be a valid integer"),
        ("name: [first", r"broken\.yaml line 1 is not valid YAML: .*; mend it there\."),
        ("first", r"broken\.yaml must hold a YAML mapping such as `name: my-run`"),
    ],
)
def test_a_config_file_that_cannot_be_read_is_refused(
    tmp_path: Path, refused: Refused, text: str, match: str
) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    refused("train", "--config", str(tmp_path / "broken.yaml"), match=match)


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        ("trian", r"orchestrator has no command 'trian'; it has pack, train"),
        ("evaluate", r"orchestrator evaluate: the following arguments are required: --run; see"),
        ("evaluate --run x --checkpoint first", r"--checkpoint: invalid choice: 'first' \(choose"),
        ("evaluate --run {root}/data", r"/data holds no config\.yaml, so it is no run; check"),
        ("report --run {root}/none", r"/none holds no config\.yaml, so it is no run; check --run"),
        ("report --run", r"orchestrator report: argument --run: expected one argument; see"),
        ("pack --source {root}/none --out {root}/o", r"--source .*/none is no folder; check"),
        ("pack --source a --out b --val-fraction x", r"--val-fraction: invalid float value: 'x'"),
        ("pack --source a --out b --val-fraction 1", r"--val-fraction must be .* but it is 1\.0"),
        ("pack --out b", r"orchestrator pack needs --source; see orchestrator pack --help"),
        ("pack --verify --out {root}/none", r"/none holds no INDEX\.json, so it is no packed data"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(
    config: str, tmp_path: Path, refused: Refused, argv: str, match: str
) -> None:
    refused(*argv.format(root=tmp_path).split(" "), match=match)


def test_a_module_that_fails_while_it_is_imported_is_named_with_the_line(
    config: str, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fails_to_import.py").write_text("import os\n\nwidth = undefined\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    match = r"does not import \(NameError: name 'undefined'.*fails_to_import\.py line 3\); check"
    refused("train", "--config", config, "--model.class_path", "fails_to_import.Net", match=match)


def test_both_lightning_packages_are_refused(
    config: str, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stubs" / "lightning").mkdir(parents=True)
    (tmp_path / "stubs" / "lightning" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "stubs"))
    match = r"both `lightning` and `pytorch-lightning` are installed .*`pip uninstall lightning`"
    refused("train", "--config", config, match=match)


def test_a_run_folder_of_another_config_is_refused(
    config: str, tmp_path: Path, refused: Refused
) -> None:
    run.open_run(configfile.load(config))
    run.append_event(f"{tmp_path}/runs/first", "submitted")
    match = r"/runs/first belongs to another config: seed was 0 and is now 1; give this run another"
    refused("train", "--config", config, "--seed", "1", match=match)


def test_early_stopping_without_validation_images_is_refused(
    config: str, tmp_path: Path, refused: Refused
) -> None:
    write_packed(tmp_path / "only-train", val=0)
    match = r"train\.early_stopping needs validation images but .*/only-train has none; pack with"
    refused("train", "--config", config, "--data.index", f"{tmp_path}/only-train", match=match)


def delete_shard(data: Path) -> None:
    (data / "train" / "00000.parquet").unlink()


def lengthen_shard(data: Path) -> None:
    with (data / "val" / "00000.parquet").open("ab") as file:
        file.write(b"x")


def change_table(data: Path) -> None:
    (path,) = data.glob("shards-*.parquet")
    table = pq.read_table(path)
    rows = pa.array([n + 1 for n in table["rows"].to_pylist()], pa.int64())
    pq.write_table(table.set_column(table.schema.get_field_index("rows"), "rows", rows), path)


def tear_table(data: Path) -> None:
    (path,) = data.glob("shards-*.parquet")
    path.write_bytes(path.read_bytes()[:-100])


def tear_index(data: Path) -> None:
    (data / "INDEX.json").write_text('{"format": 1, "digest"')


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (delete_shard, r"train/00000\.parquet is missing but the index says .*digest no longer m"),
        (lengthen_shard, r"val/00000\.parquet has \d+ bytes but the index says \d+.*restore the"),
        (change_table, r"shards-.* does not have the digest [0-9a-f]{12} that INDEX\.json names"),
        (tear_table, r"shards-.*\.parquet is damaged \(.*\); pack the data again\."),
        (tear_index, r"INDEX\.json is damaged \(JSONDecodeError.*\); pack the data again\."),
    ],
)
def test_data_that_changed_since_it_was_packed_is_refused(
    config: str, tmp_path: Path, refused: Refused, damage: Callable[[Path], None], match: str
) -> None:
    damage(tmp_path / "data")
    refused("train", "--config", config, match=match)


@pytest.mark.slow
@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("key", ["data.index", "storage_path"])
@pytest.mark.parametrize(
    ("variables", "match"),
    [
        ({}, r"s3://no-such-bucket/x.*(there is no such bucket|holds no INDEX\.json)"),
        (
            {"AWS_SECRET_ACCESS_KEY": "wrong"},
            r"s3://no-such-bucket/x.*the credentials are wrong .*check",
        ),
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:{port}"},
            r"s3://no-such-bucket/x.*endpoint http://127.* does not answer.*AWS_ENDPOINT_URL",
        ),
    ],
)
def test_a_bucket_that_cannot_be_reached_is_named(
    config: str, refused: Refused, key: str, variables: dict[str, str], match: str
) -> None:
    (port,) = free_ports(1)
    with environment({name: value.format(port=port) for name, value in variables.items()}):
        refused("train", "--config", config, f"--{key}", "s3://no-such-bucket/x", match=match)


def drop_column(data: Path, name: str) -> None:
    """Write the shards without a column, and an index that says so is how they are."""
    index, shards = read_index(str(data)), []
    for shard in read_shards(index):
        path = data / shard.path
        pq.write_table(pq.read_table(path).drop([name]), path, row_group_size=8)
        shards.append(dataclasses.replace(shard, bytes=path.stat().st_size))
    write_index(str(data), classes=index.classes, shards=shards, settings={}, quarantined=0)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_shard_without_a_column_ends_a_run_at_once(
    config: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    drop_column(tmp_path / "data", "label")
    assert main(["train", "--config", config]) == 2
    out, err = capfd.readouterr()
    last = err.splitlines()[-1]
    assert re.fullmatch(r"error: .*\.parquet has no column 'label'; pack the data again\.", last)
    assert "Traceback" not in out + err
    events = run.read_events(f"{tmp_path}/runs/first")
    assert [event["event"] for event in events].count("training") == 1, "it was tried again"
    assert [event["event"] for event in events[-2:]] == ["failed", "finished"]
    assert events[-1]["stop_reason"] == "failed"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    overview = capfd.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capfd.readouterr().out
    assert f"{command:10} {COMMANDS[command].__doc__}" in overview
    assert str(COMMANDS[command].__doc__) in text
    if command in ("train", "tune"):
        assert configfile.help_text() in text


def test_the_printed_config_can_be_given_back(
    config: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--train.precision", "32", "--train.early_stopping", "null"]
    assert main(["train", "--config", config, *flags, "--print_config"]) == 0
    printed = capfd.readouterr().out
    assert yaml.safe_load(printed)["train"]["precision"] == "32"
    (tmp_path / "printed.yaml").write_text(printed)
    assert configfile.load(f"{tmp_path}/printed.yaml") == configfile.load(config, flags)
    assert main(["train", "--config", f"{tmp_path}/printed.yaml", "--print_config"]) == 0
    assert capfd.readouterr().out == printed
    assert not (tmp_path / "runs").exists()
