"""`python -m mimo_ext plan`: see a plan before running it."""

import sys

from .planning.command import main

sys.exit(main())
