"""`orchestrator train` for `ray job submit --working-dir . -- python jobs/train.py ...`."""

import sys

from orchestrator.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
