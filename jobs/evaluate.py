"""`orchestrator evaluate` for `ray job submit --working-dir . -- python jobs/evaluate.py ...`."""

import sys

from orchestrator.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
