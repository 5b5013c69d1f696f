"""`python -m lownibble`: the command line."""

import sys

from lownibble.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
