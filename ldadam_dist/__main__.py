"""python -m ldadam_dist: the command `ldadam-dist`."""

import sys

from ldadam_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
