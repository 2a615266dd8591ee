"""The routing trace and what is counted from it: files, loads, statistics, samples, mixes."""
