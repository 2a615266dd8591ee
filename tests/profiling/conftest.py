"""Settings of the profiling tests."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: its threads spin against each other on a busy machine
settings.register_profile("moeplace", deadline=None)  # the first call of a kernel compiles it
settings.load_profile("moeplace")
