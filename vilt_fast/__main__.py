"""`python -m vilt_fast`: the command `vilt-fast`, for where the script is not on PATH."""

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main())
