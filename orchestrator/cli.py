"""`orchestrator <command>`: parses, calls one function, prints."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import rich.box
import rich.console
import rich.markup
import rich.table

from orchestrator import configfile
from orchestrator.config import Config, UserError


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors as UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help.")


def _say(line: str) -> None:
    print(line, flush=True)


def train(argv: Sequence[str]) -> int:
    """Train, or go on with, the run that a config file describes."""
    config, verbose = _config_arguments("train", argv)
    if config is None:
        return 0
    # Torch and Ray take seconds to import; a wrong argument is answered before that.
    from orchestrator.train.timing.startup import Startup, importing, process_began

    startup = Startup(process_began())
    startup.mark("command")
    with importing():
        from orchestrator.train import launch
    startup.mark("imports")
    outcome = launch.fit(config, verbose=verbose, startup=startup)
    from orchestrator.report import write_report

    report = write_report(outcome.run)
    print_table(f"run {config.name}", _run_rows(outcome.result))
    _say(f"report: {report}")
    return 0


def tune(argv: Sequence[str]) -> int:
    """Search over the space in a config's `tune` section."""
    config, verbose = _config_arguments("tune", argv)
    if config is None:
        return 0
    from orchestrator.tune import sweep

    result = sweep.search(config, verbose=verbose)
    _say(sweep.format_table(result))
    return 0 if result.best is not None else 1


def pack(argv: Sequence[str]) -> int:
    """Write images of any layout as Parquet shards with an index."""
    args = _pack_parser().parse_args(argv)
    if args.verify:
        return _verify(args.out, verbose=args.verbose)
    if args.source is None:
        raise UserError("orchestrator pack needs --source; see orchestrator pack --help.")
    # pyarrow and Ray take a second to import.
    from orchestrator.data.formats.request import Request, read_classes
    from orchestrator.data.packing.pack import pack as write_shards

    request = Request(
        format=args.format or "",
        label_kind=args.label_kind,
        label_column=args.label_column,
        image_column=args.image_column,
        id_column=args.id_column,
        classes=read_classes(args.classes) if args.classes else (),
        allow=tuple(args.allow),
    )
    names = ("chunk_rows", "val_fraction", "test_fraction", "max_side", "quality", "copy")
    settings = {name: getattr(args, name) for name in names}
    settings["max_bad_fraction"] = args.max_bad_fraction
    index = write_shards(
        args.source, args.out, request=request, say=_say, verbose=args.verbose, **settings
    )
    rows = [(name, f"{s.samples} images, {s.shards} shards") for name, s in index.splits.items()]
    rows += [("labels", index.label_kind), ("classes", str(len(index.classes)))]
    rows += [("quarantined", str(index.quarantined)), ("digest", index.digest[:12])]
    print_table(f"packed {index.uri}", rows)
    return 0


def _pack_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="orchestrator pack", description=pack.__doc__)
    parser.add_argument("--source", help="where the images are: a path or s3:// URI")
    parser.add_argument("--out", required=True, help="path or s3:// URI to write to")
    parser.add_argument("--chunk-rows", type=int, default=64, help="images in a row group")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="share for validation")
    parser.add_argument("--test-fraction", type=float, default=0.0, help="share held out")
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.1, help="share of bad samples that is too much"
    )
    parser.add_argument("--verify", action="store_true", help="check what lies in --out instead")
    parser.add_argument("--verbose", action="store_true", help="show Ray's log lines")
    layout = parser.add_argument_group("what the source is (found out where it is not said)")
    formats = ("imagefolder", "webdataset", "parquet", "manifest", "mds", "litdata")
    layout.add_argument("--format", choices=formats)
    layout.add_argument("--label-kind", choices=("class", "multi", "float", "none"))
    layout.add_argument("--label-column", default="", help="column; in a tar: cls, json:FIELD")
    layout.add_argument("--image-column", default="", help="column of bytes or of URIs")
    layout.add_argument("--id-column", default="", help="column of unique names")
    layout.add_argument("--classes", help="file with a class name a line, in the labels' order")
    layout.add_argument(
        "--allow", action="append", default=[], help="prefix that a manifest may name; repeatable"
    )
    written = parser.add_argument_group("what is written")
    written.add_argument("--copy", action="store_true", help="copy Parquet that could stay")
    written.add_argument("--max-side", type=int, default=0, help="shrink larger images, in pixels")
    written.add_argument("--quality", type=int, default=0, help="encode as JPEG of this quality")
    return parser


def _verify(out: str, *, verbose: bool) -> int:
    from orchestrator.data.packing.verify import verify

    found = verify(out, say=_say, verbose=verbose)
    rows = [("images", f"{found.samples:,}"), ("bad", f"{found.num_bad:,}")]
    print_table(f"checked {out}", [*rows, *((name, f"{n:,}") for name, n in found.reasons)])
    return 1 if found.num_bad else 0


def evaluate(argv: Sequence[str]) -> int:
    """Evaluate a run's checkpoint over every image of a split, without gradients."""
    parser = _Parser(prog="orchestrator evaluate", description=evaluate.__doc__)
    parser.add_argument("--run", required=True, help="the run's folder or s3:// URI")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument("--split", default="val", help="split of the packed data: val, test, train")
    parser.add_argument("--verbose", action="store_true", help="show Ray's log lines")
    args = parser.parse_args(argv)
    from orchestrator.evaluate import evaluate as measure
    from orchestrator.report import write_report

    found = measure(args.run, which=args.checkpoint, split=args.split, verbose=args.verbose)
    print_evaluation(found)
    _say(f"report: {write_report(args.run)}")
    return 0


def report(argv: Sequence[str]) -> int:
    """Write report.md and report.html of a run."""
    parser = _Parser(prog="orchestrator report", description=report.__doc__)
    parser.add_argument("--run", required=True, help="the run's folder or s3:// URI")
    args = parser.parse_args(argv)
    from orchestrator.report import write_report
    from orchestrator.run import read_config

    read_config(args.run)
    _say(f"report: {write_report(args.run)}")
    return 0


def plan(argv: Sequence[str]) -> int:
    """Show what a run would do and hold, and what `strategy: auto` would take; starts nothing."""
    config, _ = _config_arguments("plan", argv)
    if config is None:
        return 0
    from orchestrator.plan import describe

    _say(describe(config))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "pack": pack,
    "train": train,
    "plan": plan,
    "tune": tune,
    "evaluate": evaluate,
    "report": report,
}


def _config_arguments(command: str, argv: Sequence[str]) -> tuple[Config | None, bool]:
    parser = _Parser(
        prog=f"orchestrator {command}",
        description=COMMANDS[command].__doc__,
        epilog="settings (flags override the file):\n" + configfile.help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file or s3:// URI")
    parser.add_argument("--print_config", action="store_true", help="print the config and stop")
    parser.add_argument("--verbose", action="store_true", help="show Ray's log lines")
    args, flags = parser.parse_known_args(argv)
    config = configfile.load(args.config, flags)
    if args.print_config:
        _say(configfile.dump(config))
        return None, args.verbose
    return config, args.verbose


def _run_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    best = {k: v for k, v in result["best"].items() if k not in ("step", "epoch")}
    at = f"(epoch {result['best'].get('epoch')})"
    metrics = [(f"best {name} {at}", f"{value:.4f}") for name, value in best.items()]
    return [
        ("stopped", f"{result['stop_reason']} after {result['epochs']} epochs"),
        ("steps", str(result["steps"])),
        *metrics,
        ("images/s", f"{result['images_per_s']:.0f}"),
        ("waiting for data", f"{result['data_wait_share']:.0%}"),
        ("restarts", str(result["restarts"])),
        ("quarantined images", str(result["quarantined"])),
        *((name, str(why)) for name, why in result["decisions"].items()),
        *_time_rows(result),
    ]


def _time_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    if "time" not in result:
        return []  # the run ended before runs were timed
    parts = sorted(result["time"].items(), key=lambda part: -part[1])
    whole = max(result["allocated_s"], 1e-9)
    split = [f"{_in_words(part)} {s / whole:.0%}" for part, s in parts if s >= 0.005 * whole]
    rows = [("time", ", ".join(split)), ("productive (ETTR)", f"{result['ettr'] or 0:.0%}")]
    return [*rows, *([("verdict", result["verdict"])] if result["verdict"] else [])]


def _in_words(part: str) -> str:
    return {"wait": "waiting for data", "startup": "start-up"}.get(part, part.replace("_", " "))


def print_evaluation(found: dict[str, Any]) -> None:
    """Print an evaluation's totals and its row for each class."""
    head = f"{found['checkpoint']} checkpoint (step {found['step']}) on {found['split']}"
    rows = [
        ("accuracy", f"{found['accuracy']:.4f}"),
        ("loss", f"{found['loss']:.4f}"),
        ("images", f"{found['samples']} ({found['unreadable']} unreadable)"),
        ("images/s", f"{found['images_per_s']:.0f}"),
    ]
    for entry in found["classes"]:
        share = "none" if entry["accuracy"] is None else f"{entry['accuracy']:.4f}"
        rows.append((f"class {entry['name']}", f"{share} of {entry['samples']}"))
    print_table(head, rows)


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print two columns under a title."""
    table = rich.table.Table(title=title, box=rich.box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(rich.markup.escape(name), rich.markup.escape(value))
    rich.console.Console().print(table)


def _help() -> str:
    lines = [f"  {name:10} {command.__doc__}" for name, command in COMMANDS.items()]
    return "usage: orchestrator <command> [--help]\n\n" + "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the user's mistakes become one line and exit code 2."""
    # Read when Ray is imported: its own log lines are folded away, this one slips through.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "PYTHON worker processes have been started")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if os.getcwd() not in sys.path:
        # A console script's own folder comes first; the user's module lies where it is called.
        sys.path.insert(0, os.getcwd())
    if not arguments or arguments[0] in ("-h", "--help"):
        _say(_help())
        return 0
    try:
        if arguments[0] not in COMMANDS:
            known = ", ".join(COMMANDS)
            raise UserError(f"orchestrator has no command {arguments[0]!r}; it has {known}.")
        return COMMANDS[arguments[0]](arguments[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "TrainingFailed":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
