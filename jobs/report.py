"""`orchestrator report` for `ray job submit --working-dir . -- python jobs/report.py ...`."""

import sys

from orchestrator.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
