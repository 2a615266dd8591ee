"""Seeds of randomised tests: the fixed ones, and one that changes with the date, printed where a test fails."""

import datetime

TODAY = datetime.date.today().toordinal()
"""A seed that nobody has tried before; it stands in the test's name, so that a failure can be repeated."""

FIXED_AND_TODAY = [0, 1, 2, TODAY]
