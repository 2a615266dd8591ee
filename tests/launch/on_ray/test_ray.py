"""Ray: sweeps, services and jobs on a local cluster of two CPUs."""

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.launch.cli import main
from moeplace.launch.commands.ray_jobs import add_arguments
from moeplace.launch.on_ray import sweep
from moeplace.launch.on_ray.cluster import packaged
from moeplace.launch.on_ray.spread import RaySpread
from moeplace.launch.on_ray.submit import when_agents_are_up
from moeplace.placement.placement_file import load_placement
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.profiling.traces.file import load_trace, save_trace
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.service.api import TokenEvent
from moeplace.runtime.service.options import ServiceOptions
from tests.shared_data import tiny_moe_path

ray = pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[3]
FLOORS = ("profiling", "placement", "runtime", "launch")
WAIT = 180.0
QUIET = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of this process, with a dashboard where that is installed."""
    before = {name: os.environ.get(name) for name in QUIET}
    os.environ.update(QUIET)
    options = {"log_to_driver": False, "logging_level": "ERROR", "object_store_memory": 100 << 20}
    ray.init(address="local", num_cpus=2, include_dashboard=_has_dashboard(), dashboard_port=0, **options)
    yield ray
    ray.shutdown()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def _has_dashboard() -> bool:
    try:
        import aiohttp  # noqa: F401
        from ray.job_submission import JobSubmissionClient  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return True


@pytest.fixture(scope="module")
def trace_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids = np.random.default_rng(0).integers(0, 16, (400, 6, 1)).astype(np.int16)
    path = tmp_path_factory.mktemp("trace") / "t.trace"
    save_trace(path, RoutingTrace(ids, np.full(6, 16), sequence_ids=np.repeat(np.arange(20), 20)))
    return path


def test_a_sweep_gives_what_compare_gives(
    cluster: Any, trace_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row per instance, in order, those that cannot hold included; every row is that of the plain command."""
    words = [str(trace_path), "--ranks", "4", "--solvers", "index-order,lpt,viterbi", "--time-limit", "5"]
    assert main(["compare", *words[:4], "index-order,lpt", *words[5:], "--json", str(tmp_path / "plain.json")]) == 0
    plain = {row["solver"]: row for row in json.loads((tmp_path / "plain.json").read_text())["runs"]}
    _use(cluster, monkeypatch)
    words += ["--seeds", "2", "--json", str(tmp_path / "sweep.json")]
    assert main(["ray", "compare", *words]) == 0
    rows = json.loads((tmp_path / "sweep.json").read_text())["runs"]
    wanted = [(name, seed) for name in ("index-order", "lpt", "viterbi") for seed in (0, 1)]
    assert [(row["solver"], row["seed"]) for row in rows] == wanted
    for row in rows[:4]:
        for key in ("objective", "lower_bound", "imbalance_mean", "ranks_per_token", "max_imbalance"):
            assert row[key] == plain[row["solver"]][key]
    assert {row["status"] for row in rows[4:]} == {"failed"}  # it is for small instances
    assert "failed: viterbi" in capsys.readouterr().out


@pytest.mark.clock(0.1)
def test_a_solve_finds_what_solve_finds(
    cluster: Any, trace_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same placement, layer by layer on workers; what cannot be spread is solved here, and that is said."""
    words = [str(trace_path), "--ranks", "4", "--objective", "traffic", "--time-limit", "0.5"]
    for _ in range(2):  # the clock of the first one runs while kernels are loaded, too
        assert main(["solve", *words, "--out", str(tmp_path / "plain.json")]) == 0
    _use(cluster, monkeypatch)
    assert main(["ray", "solve", *words, "--out", str(tmp_path / "spread.json")]) == 0
    assert "this was solved here" not in capsys.readouterr().out
    plain, spread = (load_placement(tmp_path / name) for name in ("plain.json", "spread.json"))
    assert spread.digest == plain.digest
    assert main(["ray", "solve", *words, "--solver", "lpt"]) == 0
    assert "this was solved here" in capsys.readouterr().out
    assert main(["ray", "solve", *words, "--cpus-per-layer", "0"]) == 1
    assert "--cpus-per-layer (0) must be positive" in capsys.readouterr().err


def test_recordings_are_imported_as_import_does(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One trace of all of them; what a recording breaks is said in the words of `import`, and nothing is written."""
    rng = np.random.default_rng(3)
    for name in "abc":
        np.savez(tmp_path / f"{name}.npz", experts=rng.integers(0, 8, (30, 2, 1)), sequence_ids=np.arange(30) // 7)
    np.savez(tmp_path / "bad.npz", experts=np.full((4, 2, 1), -7))
    monkeypatch.chdir(tmp_path)
    words = ["a.npz", "b.npz", "c.npz", "--from", "npz", "--model", "m"]
    assert main(["import", *words, "--out", "plain.trace"]) == 0
    plain = capsys.readouterr().out
    _use(cluster, monkeypatch)
    assert main(["ray", "import", *words, "--out", "spread.trace"]) == 0
    assert capsys.readouterr().out == plain.replace("plain.trace", "spread.trace")
    assert load_trace(tmp_path / "spread.trace").equals(load_trace(tmp_path / "plain.trace"))
    assert main(["ray", "import", "b.npz", "--from", "npz", "--out", "one.trace"]) == 0
    assert load_trace(tmp_path / "one.trace").num_tokens == 30
    capsys.readouterr()
    words = ["a.npz", "bad.npz", "--from", "npz", "--strict"]
    refusals = []
    for command in (["import"], ["ray", "import"]):
        assert main([*command, *words, "--out", "x.trace"]) == 1
        refusals.append(capsys.readouterr().err.replace(f"{tmp_path}/", ""))
    assert refusals[0] == refusals[1]
    assert not (tmp_path / "x.trace").exists()


def test_recordings_are_counted_as_stats_does(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same figures, and the same words."""
    rng = np.random.default_rng(4)
    for name in "abc":
        ids = rng.integers(0, 6, (50, 3, 1)).astype(np.int16)
        trace = RoutingTrace(ids, np.full(3, 6), sequence_ids=np.repeat(np.arange(10), 5))
        save_trace(tmp_path / f"{name}.trace", trace)
    monkeypatch.chdir(tmp_path)
    words = ["c.trace", "a.trace", "b.trace", "--seed", "9"]
    assert main(["stats", *words, "--json", "plain.json"]) == 0
    plain = capsys.readouterr().out
    _use(cluster, monkeypatch)
    assert main(["ray", "stats", *words, "--json", "spread.json"]) == 0
    assert capsys.readouterr().out == plain
    found = [json.loads((tmp_path / name).read_text()) for name in ("plain.json", "spread.json")]
    assert found[0] == found[1]
    (tmp_path / "foreign.trace").write_bytes(b"not what it should be \xff\x00")
    for name in ("none.trace", "foreign.trace"):
        refusals = []
        for command in (["stats"], ["ray", "stats"]):
            assert main([*command, "a.trace", name]) == 1
            refusals.append(capsys.readouterr().err.replace(f"{tmp_path}/", ""))
        assert refusals[0] == refusals[1]
        assert name in refusals[0]


def test_tasks_that_nobody_waits_for_are_ended(cluster: Any, tmp_path: Path) -> None:
    """Answers come as they are ready; who takes no more of them leaves nothing running.

    Again and again, because Ray forgets one in seven that is on its way to a worker while it is cancelled.
    """
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        answers = RaySpread(lambda: cluster, cpus=1).each(_until_there, str(folder), ["first", "never", "later"])
        (folder / "first").touch()
        assert next(answers) == (0, "first")
        answers.close()
        assert cluster.get(cluster.remote(num_cpus=2)(_one).remote(), timeout=WAIT) == 1  # all CPUs are free again


def test_a_sweep_that_is_interrupted_leaves_nothing_running(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it was that ended it after its first row."""
    monkeypatch.setattr(sweep, "solve_instance", _row_when_there)
    instances = [sweep.Instance("t", name, None, 0) for name in ("first", "never", "later")]

    def interrupt(share: float) -> None:
        raise KeyboardInterrupt

    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        (folder / "first").touch()
        options = argparse.Namespace(folder=str(folder))
        with pytest.raises(KeyboardInterrupt):
            sweep.run_sweep(cluster, instances, {"t": None}, options, cpus=1, report=interrupt)
        assert cluster.get(cluster.remote(num_cpus=2)(_one).remote(), timeout=WAIT) == 1


def _row_when_there(instance: sweep.Instance, sides: None, args: argparse.Namespace) -> dict[str, str]:
    return {"solver": _until_there(args.folder, instance.solver)}


def _until_there(folder: str, name: str) -> str:
    # In a process of Ray: what tells it to go on must be none of the actors and tasks that are cancelled here, and what
    # it waits in must be ended by Ray's interrupt, as a file that blocks its reader is not.
    while not (Path(folder) / name).exists():
        time.sleep(0.01)
    return name


def _one() -> int:
    return 1


def test_a_layer_that_fails_ends_the_solve_in_a_sentence(cluster: Any) -> None:
    """Whatever it was, and no other layer goes on."""
    with pytest.raises(MoeplaceError, match=r"a layer failed on the Ray cluster: .*7 is too many"):
        RaySpread(lambda: cluster)(_refuse, 7, [0, 1, 2], lambda share: None)


def _refuse(shared: int, item: int) -> int:
    raise ValueError(f"{shared} is too many")


def _use(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands use the cluster that this process is connected to, and not leave it."""
    monkeypatch.setattr(cluster, "init", lambda **options: None)
    monkeypatch.setattr(cluster, "shutdown", lambda: None)


class Listener:
    """Collects the tokens of a request."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.some, self.ended = threading.Event(), threading.Event()
        self.reason: str | None = None

    def __call__(self, event: TokenEvent) -> None:
        self.tokens += event.token_ids
        self.reason = event.finish_reason
        if len(self.tokens) > 3:
            self.some.set()
        if event.finish_reason is not None:
            self.ended.set()


def groups(cluster: Any) -> set[str]:
    """Placement groups that are reserved."""
    table = cluster.util.placement_group_table()
    return {name for name, group in table.items() if group["state"] != "REMOVED"}


def test_a_service_of_actors(cluster: Any) -> None:
    """Two ranks; one is killed and followed in its bundle, one joins, two leave: tokens are those of one rank alone."""
    import torch

    from moeplace.launch.on_ray.spawner import RaySpawner
    from moeplace.runtime.service.coordinator.coordinator import Coordinator

    requests = [Request(f"r{n}", tuple(range(5 + n, 9 + n)), 100, stop_ids=()) for n in range(4)]
    limits = EngineLimits(max_sequences=8, staging_rows=1)
    expected = Engine(tiny_moe_path(), dtype=torch.float64, limits=limits).generate(requests)
    options = ServiceOptions(dtype="float64", limits=limits, keep_width=True)
    host = cluster.util.get_node_ip_address()
    spawner = RaySpawner(cpus=0.5)
    service = Coordinator(tiny_moe_path(), ranks=2, spawner=spawner, options=options, host=host)
    try:
        service.wait_until_serving(timeout=WAIT)
        before = groups(cluster)
        assert len(before) == 2
        listeners = [Listener() for _ in requests]
        for request, listener in zip(requests, listeners, strict=True):
            service.submit(request, listener)
        assert all(listener.some.wait(WAIT) for listener in listeners)
        lost = service.member(1)
        os.kill(lost.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        service.scale(3)
        assert service.wait_for(lambda status: status.routable == (0, 2, 3), timeout=WAIT), service.status()
        assert len(groups(cluster)) == 3
        assert before < groups(cluster)
        assert all(listener.ended.wait(WAIT) for listener in listeners)
        assert [tuple(listener.tokens) for listener in listeners] == [c.token_ids for c in expected]
        service.scale(1)
        assert service.wait_for(lambda status: len(status.allocated) == 1, timeout=WAIT), service.status()
    finally:
        service.close(drain=False, timeout=WAIT)
    assert groups(cluster) == set()


@pytest.mark.skipif(not _has_dashboard(), reason="jobs need ray[default]")
def test_a_command_as_a_job(cluster: Any, trace_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its output and its outcome come back; it runs this package, shipped."""
    address = f"http://{cluster._private.worker._global_node.address_info['webui_url']}"
    out = tmp_path / "p.json"
    words = ["solve", str(trace_path), "--ranks", "4", "--solver", "lpt", "--out", str(out)]
    assert main(["ray", "submit", "--address", address, "--python", sys.executable, "--", *words]) == 0
    assert json.loads(out.read_text())["num_ranks"] == 4
    assert f"wrote {out}" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("refusals", "message", "tries"), [(3, "No available agent to submit job", 4), (9, "no such package", 1)]
)
def test_a_cluster_that_has_no_agent_yet(refusals: int, message: str, tries: int) -> None:
    """Its dashboard is up before any agent is: only that refusal is asked again."""
    asked = []

    def submit() -> str:
        asked.append(1)
        if len(asked) <= refusals:
            raise RuntimeError(f"Request failed with status code 500: {message}")
        return "job"

    if tries > refusals:
        assert when_agents_are_up(submit, wait=30.0, pause=0.0) == "job"
    else:
        with pytest.raises(RuntimeError, match=message):
            when_agents_are_up(submit, wait=30.0, pause=0.0)
    assert len(asked) == tries


def test_a_cluster_that_never_has_an_agent() -> None:
    """The wait has an end, and then the refusal is said."""

    def submit() -> str:
        raise RuntimeError("No available agent to submit job")

    with pytest.raises(RuntimeError, match="No available agent"):
        when_agents_are_up(submit, wait=0.0, pause=0.0)


@pytest.mark.soak
@pytest.mark.skipif(not _has_dashboard(), reason="jobs need ray[default]")
def test_a_job_that_fails(cluster: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Its sentence is shown, and the exit code is that of a failure."""
    address = f"http://{cluster._private.worker._global_node.address_info['webui_url']}"
    submit = ["ray", "submit", "--address", address, "--python", sys.executable]
    assert main([*submit, "--", "solve", "none.trace", "--ranks", "4"]) == 1
    assert "no such file" in capfd.readouterr().out


def test_the_package_that_is_shipped() -> None:
    """All modules and data of the four folders, and the metadata that says the version."""
    with packaged() as environment:
        code, info = map(Path, environment["py_modules"])
        assert (code / "launch" / "data" / "tiny-moe" / "config.json").is_file()
        modules = {path.relative_to(ROOT) for floor in FLOORS for path in (ROOT / floor).rglob("*.py")}
        assert {path.relative_to(code) for path in code.rglob("*.py")} == modules
        assert not list(code.rglob("__pycache__"))
        assert "Name: moeplace" in (info / "METADATA").read_text()
    assert not code.exists()
    with packaged(ship=False) as environment:
        assert environment == {}


def test_one_sentence_without_ray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What to install."""
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["ray", "submit", "--", "solve", "x"]) == 1
    assert "pip install 'moeplace[ray]'" in capsys.readouterr().err


def test_one_sentence_without_a_cluster(
    trace_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody listens there."""
    from moeplace.launch.on_ray.cluster import connected

    def refuse(**options: object) -> None:
        raise ConnectionError("Could not find any running Ray instance. Please specify one.")

    monkeypatch.setattr(ray, "init", refuse)
    sentence = r"no Ray cluster here .*Could not find any running Ray instance$"
    with pytest.raises(MoeplaceError, match=sentence), connected(None):
        pass
    assert main(["ray", "compare", str(trace_path), "--ranks", "4", "--address", "10.0.0.1:6379"]) == 1
    assert capsys.readouterr().err.startswith("moeplace: no Ray cluster at 10.0.0.1:6379")


@pytest.mark.parametrize("words", [[], ["--"], ["--", "nothing"]])
def test_a_job_needs_a_command(words: list[str]) -> None:
    """Of moeplace."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["submit", *words])
    with pytest.raises(InputError, match="after -- comes a command"):
        args.run_ray(args)
