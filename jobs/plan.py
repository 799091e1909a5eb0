"""`orchestrator plan` for `ray job submit --working-dir . -- python jobs/plan.py ...`."""

import sys

from orchestrator.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
