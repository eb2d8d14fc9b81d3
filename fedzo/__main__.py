"""``python -m fedzo``."""

import sys

from fedzo.cli import main

if __name__ == "__main__":
    sys.exit(main())
