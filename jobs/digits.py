"""The quick start: handwritten digits as image files -> packed -> trained -> evaluated -> report.

    python jobs/digits.py [--section.field VALUE ...]

The images come with scikit-learn; from the ImageFolder tree on they are treated as anyone's bucket.
"""

import sys
from pathlib import Path

import cv2
from sklearn.datasets import load_digits

from orchestrator import cli, configfile
from orchestrator.run import run_uri

CONFIG = Path(__file__).with_name("digits.yaml")
SOURCE = Path("data/digits")


def write_images(root: Path) -> None:
    """Write the digits as 8-bit grey PNG files, root/<digit>/<number>.png; present ones stay."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = root / str(label) / f"{number:04d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), (image * (255 / 16)).astype("uint8"))


def main(flags: list[str]) -> int:
    """Write the images, then run three commands one after the other, as a user would."""
    if "--help" in flags:
        print(f"usage: python jobs/digits.py [--section.field VALUE ...]\n{__doc__}")
        return 0
    config = configfile.load(str(CONFIG), flags)
    write_images(SOURCE)
    fractions = ["--val-fraction", "0.15", "--test-fraction", "0.15"]
    return (
        cli.main(["pack", "--source", str(SOURCE), "--out", config.data.index, *fractions])
        or cli.main(["train", "--config", str(CONFIG), *flags])
        or cli.main(["evaluate", "--run", run_uri(config), "--split", "test"])
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
