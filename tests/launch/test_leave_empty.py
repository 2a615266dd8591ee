"""`solve --leave-empty` from end to end."""

import argparse
from pathlib import Path

import numpy as np

from moeplace.launch.commands import solve
from moeplace.placement.placement_file import load_placement
from moeplace.profiling.traces.file import save_trace
from moeplace.profiling.traces.trace import RoutingTrace


def test_slots_stay_empty_only_where_that_was_asked_for(tmp_path: Path) -> None:
    """Tokens of a group of experts never leave it: index order is perfect, and any replica is one more to read."""
    group_T = np.random.default_rng(0).permutation(400) % 4
    ids_TLK = np.stack([group_T * 3, group_T * 3 + 1, group_T * 3 + 2], axis=1)[:, None].repeat(2, axis=1)
    save_trace(tmp_path / "t.npz", RoutingTrace(ids_TLK, np.full(2, 12), sequence_ids=np.arange(400) // 40))
    empty = []
    for flags in ([], ["--leave-empty"]):
        parser = argparse.ArgumentParser()
        solve.add_arguments(parser)
        words = ["--ranks", "4", "--slots-per-rank", "4", "--time-limit", "0.5", *flags]
        out = str(tmp_path / "p.json")
        assert solve.run(parser.parse_args([str(tmp_path / "t.npz"), *words, "--out", out])) == 0
        empty.append(int((load_placement(out).slot_to_expert < 0).sum()))
    assert empty[0] == 0
    assert empty[1] > 0
