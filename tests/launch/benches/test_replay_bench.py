"""`moeplace bench replay` and `moeplace calibrate` on two ranks under torchrun, and the emulated cluster."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moeplace.launch.benches.replay import RunName
from moeplace.launch.commands.benchmarks.replay import format_report
from moeplace.placement.cost.calibration import Calibration
from moeplace.placement.placement import index_order
from moeplace.placement.placement_file import save_placement
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.file import save_trace
from moeplace.profiling.traces.trace import RoutingTrace
from tests.shared_data import ROOT

SCRIPT = ROOT / "benchmarks" / "emulated_cluster.py"
SMALL = ["--batch", "16", "--hidden", "32", "--expert-hidden", "8", "--kv-dim", "8"]
RUN_KEYS = {
    "placement", "mode", "seconds_per_step", "tokens_per_second", "collectives_per_layer", "bytes_inter_node",
    "bytes_intra_node", "predicted_seconds", "prediction_error", "speedup",
}  # fmt: skip


def torchrun(*command: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    cli = ["-m", "moeplace.launch.cli"]
    return subprocess.run(
        [sys.executable, *launcher, *cli, *command], capture_output=True, text=True, timeout=100, check=False
    )


def test_run_names() -> None:
    """PLACEMENT:MODE with an optional form; a path may contain colons."""
    assert RunName.parse("a:b.json:coherent") == RunName("a:b.json", "coherent", "")
    assert RunName.parse("index-order:dispatch-combine/plain").form == "plain"
    for text in ("index-order", ":coherent", "p.json:fast", "p.json:coherent/plain", "p.json:dispatch-combine/odd"):
        with pytest.raises(InputError, match="run "):
            RunName.parse(text)


def test_replay_and_calibration_on_two_ranks(tmp_path: Path) -> None:
    """A calibration is written and used; the report has every key, exact collectives and equal outputs."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((96, 3, 8)), axis=2)[..., :1]
    trace, placement, calibration, report = (tmp_path / name for name in ("t.npz", "p.json", "c.json", "r.json"))
    save_trace(trace, RoutingTrace(ids, np.full(3, 8), sequence_ids=np.arange(96) // 8))
    order = index_order(np.full(3, 8), np.full(2, 4), np.zeros(2, int))
    save_placement(placement, order.replace(slot_to_expert=order.slot_to_expert[:, ::-1]))
    measured = torchrun("calibrate", "--out", str(calibration), "--num-experts", "8", *SMALL)
    assert measured.returncode == 0, measured.stderr
    assert set(Calibration.load(calibration).mode_seconds_per_layer) == {"dispatch-combine", "coherent", "allgather"}
    runs = f"index-order:dispatch-combine,{placement}:coherent"
    options = ["--steps", "4", "--block", "2", "--calibration", str(calibration), "--json", str(report)]
    done = torchrun("bench", "replay", str(trace), "--runs", runs, *options, *SMALL)
    assert done.returncode == 0, done.stderr
    figures = json.loads(report.read_text())
    baseline, coherent = figures["runs"]
    assert set(baseline) >= RUN_KEYS
    assert set(coherent) >= RUN_KEYS
    assert (baseline["collectives_per_layer"], coherent["collectives_per_layer"]) == (2, 1)
    assert baseline["speedup"] == 1
    assert baseline["bytes_inter_node"] == 0
    assert coherent["output_difference"] < 0.05  # bfloat16
    assert format_report(figures) in done.stdout


def namespaces_or_skip() -> None:
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("network namespaces need root and iproute2")
    probe = subprocess.run(["ip", "netns", "add", "moeplace-probe"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", "moeplace-probe"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("this machine has no network namespaces")


def hosts_of(owner: int) -> list[str]:
    listing = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line for line in listing.splitlines() if line.startswith(f"moeplace-{owner}-")]


@pytest.mark.netns
def test_emulated_cluster_returns_the_exit_code(tmp_path: Path) -> None:
    """Ranks are spread over hosts of their own addresses; the code of the rank that failed comes back."""
    namespaces_or_skip()
    program = tmp_path / "program.py"
    program.write_text("import os, sys\nsys.exit(7 if os.environ['RANK'] == '1' else 0)\n")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--ranks-per-host", "1", "--", str(program)], capture_output=True, check=False
    )
    assert done.returncode == 7


@pytest.mark.netns
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_emulated_cluster_tears_down_when_killed(tmp_path: Path, number: signal.Signals) -> None:
    """No namespace outlives the run, even after SIGKILL."""
    namespaces_or_skip()
    program = tmp_path / "program.py"
    program.write_text("import time\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--ranks-per-host", "1", "--", str(program)], stderr=subprocess.DEVNULL
    )
    wait_until(lambda: len(hosts_of(process.pid)) == 2)
    process.send_signal(number)
    process.wait(30)
    wait_until(lambda: not hosts_of(process.pid))
    if number is signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM


def test_emulated_cluster_refuses_politely() -> None:
    """No command: exit 2 and one sentence."""
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no command" in done.stderr


def wait_until(condition: Callable[[], bool], timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)
