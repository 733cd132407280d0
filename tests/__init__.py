"""The tests; what they print is as wide as without a terminal, also in xdist's workers, which are told of one."""

import os

os.environ.pop("COLUMNS", None)
