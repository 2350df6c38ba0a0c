"""`python -m s4audio` is `s4audio`."""

import sys

from s4audio.cli import main

if __name__ == "__main__":
    sys.exit(main())
