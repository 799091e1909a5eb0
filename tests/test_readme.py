"""The README cannot rot: its links, files and commands exist, its sections are in order."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import cli

ROOT = Path(__file__).resolve().parents[1]

# What a section's heading must contain, in order.
SECTIONS = (
    "quick start",
    "cluster",
    "how an image travels",
    "where does it go?",
    "measured",
    "goals and non-goals",
)
FILE_ENDINGS = (".py", ".yaml", ".yml", ".toml", ".txt", ".md", ".json", ".sh")
OUR_FOLDERS = ("orchestrator/", "jobs/", "tests/", "docs/", ".ci/")
# Written by the commands themselves, or lying where only the reader's machine has them.
NOT_IN_A_CLONE = ("runs/", "data/", "build/", ".venv/", "/", "~", "$", "s3://", "http")

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
_INLINE_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def readme() -> str:
    return (ROOT / "README.md").read_text()


def section(text: str, title: str) -> str:
    """Return what stands below the heading `## title`."""
    _, found, rest = text.partition(f"\n## {title}\n")
    assert found, f"README.md has no section {title!r}"
    return re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def fences(text: str, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    return [body for kind, body in _FENCE.findall(text) if kind == language]


def prose(text: str) -> str:
    """Return a text without its fenced blocks."""
    return _FENCE.sub("", text)


def named_files(block: str) -> Iterator[str]:
    """Yield the words of a bash block that name files of this repository."""
    for line in block.replace("\\\n", " ").splitlines():
        for word in shlex.split(line, comments=True):
            path = word.rpartition("=")[2].removeprefix("./").rstrip(";&|,")
            if path.startswith(NOT_IN_A_CLONE) or path.startswith("-"):
                continue
            if path.endswith(FILE_ENDINGS) or path.startswith(OUR_FOLDERS):
                yield path


def named_commands(text: str) -> set[str]:
    """Return every <command> of `orchestrator <command>` in bash blocks and inline code."""
    code = fences(text, "bash") + _INLINE_CODE.findall(prose(text))
    return {c for part in code for c in re.findall(r"\borchestrator ([a-z][a-z-]*)", part)}


def test_sections_are_in_order() -> None:
    headings = re.findall(r"^## (.+)$", prose(readme()), re.MULTILINE)
    places = []
    for wanted in SECTIONS:
        matching = [n for n, heading in enumerate(headings) if wanted in heading.lower()]
        assert matching, f"README.md has no section about {wanted!r}"
        places.append(matching[0])
    assert places == sorted(set(places)), headings


def test_the_picture_comes_before_the_quick_start() -> None:
    text = readme()
    assert text.startswith("# ")
    opening = text.partition("\n## ")[0]
    assert _FENCE.search(opening) or "![" in opening


def test_quick_start_has_exactly_two_bash_blocks() -> None:
    first, second = fences(section(readme(), "Quick start"), "bash")
    assert "pip install -c constraints.txt" in first
    assert "pytest" in second


def test_the_licence_is_named() -> None:
    assert "LICENSE" in _LINK.findall(readme())
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_relative_links_lead_somewhere() -> None:
    links = [link.partition("#")[0] for link in _LINK.findall(prose(readme()))]
    relative = [link for link in links if link and "://" not in link]
    assert [link for link in relative if not (ROOT / link).exists()] == []


def test_links_into_the_page_lead_to_a_heading() -> None:
    text = prose(readme())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    assert [link for link in re.findall(r"\]\(#([^)]+)\)", text) if link not in anchors] == []


def test_files_named_in_commands_exist() -> None:
    blocks = fences(readme(), "bash")
    assert blocks
    missing = [f for block in blocks for f in named_files(block) if not (ROOT / f).exists()]
    assert missing == []


def test_our_files_named_in_the_text_exist() -> None:
    named = [code for code in _INLINE_CODE.findall(prose(readme())) if code.startswith(OUR_FOLDERS)]
    plain = [code for code in named if re.fullmatch(r"[\w./-]+", code)]
    assert [path for path in plain if not (ROOT / path).exists()] == []


def test_commands_exist() -> None:
    commands = named_commands(readme())
    assert commands
    assert commands <= cli.COMMANDS.keys()


@pytest.mark.parametrize(
    ("block", "files"),
    [
        ("pip install -c constraints.txt -e '.[test]'", ["constraints.txt"]),
        ("orchestrator train --config jobs/a.yaml --name x", ["jobs/a.yaml"]),
        ("orchestrator train --config=./jobs/a.yaml \\\n  --seed 1", ["jobs/a.yaml"]),
        ("bash .ci/run  # or tests/x.py", [".ci/run"]),
        ("orchestrator report --run runs/digits && cat runs/digits/report.md", []),
        ("orchestrator pack --source s3://b/x.json --out /tmp/x.txt", []),
    ],
)
def test_files_are_found_in_commands(block: str, files: list[str]) -> None:
    assert list(named_files(block)) == files


def test_commands_are_found_in_code_only() -> None:
    text = "orchestrator is\n`orchestrator train --x`\n```bash\norchestrator pack \\\n--a b\n```\n"
    assert named_commands(text) == {"train", "pack"}
