"""House rules that no linter knows: the direction of the layout, file sizes, names, CI."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "orchestrator"

# Lowest first. A unit (a package or a top-level module) imports only from layers below its own.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("config",),
    ("overrides",),
    ("stores",),
    ("storage",),
    ("configfile",),
    ("cluster", "progress", "run"),
    ("data",),
    ("train",),
    ("evaluate", "plan"),
    ("plots", "templates"),
    ("tables",),
    ("report",),
    ("tune",),
    ("cli",),
    ("jobs",),
)
LAYER_OF = {unit: layer for layer, units in enumerate(LAYERS) for unit in units}
# The packages of orchestrator/train, in the same way.
TRAIN_LAYERS = (
    ("timing",),
    ("strategies",),
    ("saving",),
    ("logs", "recovery", "validation"),
    ("loop",),
)
TRAIN_LAYER_OF = {name: layer for layer, names in enumerate(TRAIN_LAYERS) for name in names}

# These decide, compute or describe: they must be readable and testable without a cluster.
WITHOUT_RAY_AND_TORCH = (
    "config.py",
    "configfile.py",
    "overrides.py",
    "storage.py",
    "run.py",
    "plots.py",
    "data/index.py",
    "data/plan.py",
    "data/images/crop.py",
    "data/images/bad.py",
    "data/images/check.py",
    "data/images/decode.py",
    "data/images/header.py",
    "data/images/jpeg.py",
    "data/stream.py",
    "data/balance.py",
    "data/mix.py",
    "data/quality.py",
    "data/shard_table.py",
    "data/sources.py",
    "tune/results.py",
    "tune/rungs.py",
    "tune/space.py",
    "templates.py",
    "train/recovery/failures.py",
    "train/timing/measured.py",
    "train/timing/timeline.py",
    "train/timing/verdict.py",
    "train/validation/stopping.py",
    "train/validation/timetable.py",
)
MAX_LINES = 300
VAGUE_WORDS = {"util", "utils", "manager", "helpers", "misc"}


def python_files(*folders: str) -> list[Path]:
    """Return our Python files below these folders of the repository."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def unit_of(path: Path) -> str:
    """Return the package or top-level module a file belongs to: "data", "config", "jobs"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "orchestrator" else parts[0]


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of everything a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path}:{node.lineno}: write the whole name, not a relative one"
            )
            module = node.module or ""
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def wrong_imports(path: Path) -> Iterator[str]:
    """Yield a sentence for each import that points up or sideways."""
    unit = unit_of(path)
    for line, name in imported_modules(path):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0] if top == "orchestrator" else top
        if top not in ("orchestrator", "jobs") or target == unit:
            continue
        if target not in LAYER_OF:
            yield f"{path}:{line} imports {name}: place {target!r} in LAYERS of this test"
        elif LAYER_OF[target] >= LAYER_OF[unit]:
            yield f"{path}:{line} imports {name}: {unit} lies below or beside {target}"


def test_every_unit_has_its_place() -> None:
    units = {unit_of(p) for p in python_files("orchestrator", "jobs")} - {"__init__"}
    assert units <= LAYER_OF.keys(), "place the new unit in LAYERS of tests/test_layout.py"


def test_dependencies_point_one_way() -> None:
    assert (PACKAGE / "config.py").exists()
    wrong = [s for p in python_files("orchestrator", "jobs") for s in wrong_imports(p)]
    assert wrong == []


def test_an_import_that_points_up_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    module = tmp_path / "orchestrator" / "data" / "x.py"
    module.parent.mkdir(parents=True)
    module.write_text(
        "from orchestrator import storage\nfrom orchestrator.data import y\nimport ray\n"
        "def f():\n    import orchestrator.train.launch\nfrom orchestrator import cli, nowhere\n"
    )
    found = list(wrong_imports(module))
    assert len(found) == 3
    assert "x.py:5 imports orchestrator.train.launch" in found[2]
    assert "x.py:6 imports orchestrator.cli" in found[0]
    assert "place 'nowhere'" in found[1]


def test_the_packages_of_training_point_one_way() -> None:
    train = PACKAGE / "train"
    packages = {path.parent.name for path in train.glob("*/__init__.py")}
    assert packages == TRAIN_LAYER_OF.keys(), "place the new package in TRAIN_LAYERS"
    wrong = [
        f"{path}:{line} imports {name}"
        for package in packages
        for path in (train / package).glob("*.py")
        for line, name in imported_modules(path)
        for target in packages & set(name.split(".")[2:3])
        if name.startswith("orchestrator.train.") and target != package
        if TRAIN_LAYER_OF[target] >= TRAIN_LAYER_OF[package]
    ]
    assert wrong == []


@pytest.mark.parametrize("name", WITHOUT_RAY_AND_TORCH)
def test_pure_files_import_neither_ray_nor_torch(name: str) -> None:
    tops = {module.split(".")[0] for _, module in imported_modules(PACKAGE / name)}
    assert tops & {"ray", "torch", "pytorch_lightning", "deepspeed"} == set()


def test_reading_a_config_loads_neither_ray_nor_torch() -> None:
    code = (
        "import sys, orchestrator.config, orchestrator.configfile; "
        "print(sorted({'ray', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "[]\n"


def test_only_the_stores_know_the_storage_clients() -> None:
    clients = {"s3fs", "botocore", "aiobotocore", "boto3", "fsspec", "obstore"}
    found = {
        str(path.relative_to(ROOT))
        for path in python_files("orchestrator", "jobs")
        for _, name in imported_modules(path)
        if name.split(".")[0] in clients
    }
    stores = {
        f"orchestrator/stores/{n}.py" for n in ("answers", "buckets", "identity", "objects", "s3")
    }
    # The benchmark measures the clients themselves.
    assert found == stores | {"jobs/bench_read.py"}


@pytest.mark.parametrize("folder", ["orchestrator", "tests", "jobs"])
def test_files_stay_short(folder: str) -> None:
    lengths = {str(p): len(p.read_text().splitlines()) for p in python_files(folder)}
    assert {p: n for p, n in lengths.items() if n > MAX_LINES} == {}, "split it by role"


def test_names_say_what_is_inside() -> None:
    stems = [p.stem for p in python_files("orchestrator", "tests", "jobs")]
    assert [s for s in stems if VAGUE_WORDS & set(s.lower().split("_"))] == []


def test_no_two_test_files_share_a_name() -> None:
    # pytest imports them by their bare names: the second stops the whole run.
    stems = [path.stem for path in python_files("tests")]
    assert sorted(stems) == sorted(set(stems))


def test_only_the_command_line_prints() -> None:
    printing = []
    for path in python_files("orchestrator"):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        names = {n.func.id for n in calls if isinstance(n.func, ast.Name)}
        if "print" in names and unit_of(path) != "cli":
            printing.append(str(path))
    assert printing == []


def test_pre_commit_runs_what_ci_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = [hook["entry"] for hook in hooks]
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert entries == [line for line in lines if line.startswith(("ruff ", "mypy"))]
    assert len(entries) == 3
