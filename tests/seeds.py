"""Seeds of randomised tests: the fixed ones, and one that changes with the date, printed where a test fails."""

import datetime
import os

TODAY = int(os.environ.get("MOEPLACE_SEED") or f"{datetime.datetime.now(datetime.UTC):%Y%m%d}")
"""A seed that nobody has tried before; it stands in the test's name, so that a failure can be repeated (`--seed`)."""

FIXED_AND_TODAY = [0, 1, 2, TODAY]
