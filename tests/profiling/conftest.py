"""Settings of the profiling tests."""

from hypothesis import settings

settings.register_profile("moeplace", deadline=None)  # the first call of a kernel compiles it
settings.load_profile("moeplace")
