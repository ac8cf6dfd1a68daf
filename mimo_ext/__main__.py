"""`python -m mimo_ext plan`: see a plan before running it. `python -m mimo_ext flight`: who waits for whom."""

import sys

from .planning.command import main

sys.exit(main())
