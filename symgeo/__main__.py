"""``python -m symgeo``."""

import sys

from symgeo.cli import main

if __name__ == "__main__":
    sys.exit(main())
