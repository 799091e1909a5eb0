"""`orchestrator tune` for `ray job submit --working-dir . -- python jobs/tune.py ...`."""

import sys

from orchestrator.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
