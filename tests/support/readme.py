"""README's Python, for whoever reads it: `python tests/support/readme.py` prints it as one file for a type checker."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: What README's reader has at hand.
GIVEN = """\
import torch
from PIL import Image

inputs: dict[str, torch.Tensor] = {}
image = Image.new("RGB", (8, 8))
"""


def blocks() -> list[str]:
    """The Python blocks of README, in order."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)


if __name__ == "__main__":
    print("\n".join([GIVEN, *blocks()]))
