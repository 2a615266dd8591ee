"""A placement file's claims: what `solve` writes is confirmed, what is changed afterwards is refuted."""

import copy
import functools
import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.launch.cli import main
from moeplace.placement.bounds.certificate import certificate
from moeplace.placement.bounds.problem import held_imbalance, prove
from moeplace.placement.budget import Budget
from moeplace.placement.cluster import Cluster, Link
from moeplace.placement.objective import measure
from moeplace.placement.placement_file import save_placement
from moeplace.placement.problem import Problem
from moeplace.placement.solvers import get_solver
from moeplace.placement.statement import state, tokens_digest
from moeplace.placement.verification.claims import check_claims, proven, statement_of
from moeplace.placement.verification.statement import Statement
from moeplace.profiling.errors import FormatError
from moeplace.profiling.synthetic.traces import topics
from moeplace.profiling.traces.file import load_trace, save_trace
from moeplace.profiling.traces.loads import LoadStats, save_load
from tests.placement.instances import skewed_trace
from tests.seeds import FIXED_AND_TODAY


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
@pytest.mark.parametrize("mode", ["dispatch-combine", "coherent", "allgather"])
def test_bounds_agree(seed: int, mode: str) -> None:
    """Both rooms prove the same: closed forms and relaxation; replicas, nodes, speeds, distances, ragged, caps."""
    for turn, slots in enumerate(((4, [6, 4, 5, 4]), (5, [5, 3, 4, 4]))[seed % 2]):
        trace = skewed_trace(seed, tokens=120, layers=3, experts=16, top_k=1 + seed % 3, ragged=0.3 * (seed % 2))
        node_R = np.array([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1]][(seed + turn) % 3])
        cluster = Cluster.uniform(4, slots_per_rank=slots).replace(node_of_rank=node_R)
        if seed % 4 == 1:
            line = np.arange(4.0)
            cluster = cluster.replace(speed_of_rank=np.array([1.0, 1, 0.5, 2]), distance_RR=abs(line[:, None] - line))
        elif turn:  # nodes share a port
            cluster = cluster.replace(inter=Link(1e-5, 1e10, 0.7e10))
        problem = Problem.from_trace(trace, cluster, mode=mode, max_imbalance=1.2 if seed % 3 else None)
        assert_bounds_agree(problem)


@pytest.mark.parametrize("mode", ["dispatch-combine", "coherent", "allgather"])
def test_bounds_agree_on_nodes_of_two_and_three_ranks(mode: str, dated_seed: int) -> None:
    """Whose ranks are gateways for unlike numbers of homes; sharing a port; with paths that are longer one way."""
    trace = skewed_trace(dated_seed, tokens=120, experts=16)
    one_way_RR = np.triu(np.random.default_rng(dated_seed).uniform(1, 4, (7, 7)), 1)
    for port, distance_RR in ((np.inf, None), (0.7e10, None), (np.inf, one_way_RR + 0.5 * one_way_RR.T)):
        cluster = Cluster.uniform(7, slots_per_rank=[3, 2, 2, 3, 2, 2, 2], inter=Link(1e-5, 1e10, port))
        nodes = cluster.replace(node_of_rank=np.array([0, 0, 1, 1, 1, 2, 2]), distance_RR=distance_RR)
        assert_bounds_agree(Problem.from_trace(trace, nodes, mode=mode))


def assert_bounds_agree(problem: Problem) -> None:
    """Proven with all iterations, however busy the machine; the verifier reads both from JSON."""
    caps_L = held_imbalance(problem)
    ours = prove(problem, time_limit=30.0, caps_L=caps_L)
    statement = Statement.from_document(json.loads(json.dumps(state(problem, objective="traffic", caps_L=caps_L))))
    found = proven(statement, problem.trace, problem.cluster.slots_of_rank, json.loads(json.dumps(ours.proofs)))
    assert found == pytest.approx(ours.bounds, rel=1e-7), problem.cluster.slots_of_rank


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(placement file, trace file) of a small problem whose bound needs the relaxation, however busy the machine."""
    return solved_with(4, 1.1, tmp_path_factory.mktemp("solved"))


@pytest.fixture(scope="module")
def with_replicas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same with a redundant slot on each rank."""
    return solved_with(5, None, tmp_path_factory.mktemp("replicas"))


def solved_with(slots: int, cap: float | None, folder: Path) -> tuple[Path, Path]:
    trace = topics(num_tokens=1024, num_layers=2, num_experts=16, top_k=3, num_topics=6, contrast=2.0, seed=1)
    save_trace(folder / "t.trace", trace)
    cluster = Cluster.uniform(4, slots_per_rank=slots)
    problem = Problem.from_trace(trace.split("train"), cluster, objective="traffic", max_imbalance=cap)
    caps_L = held_imbalance(problem)
    placement = problem.placement(get_solver("lpt")(problem, Budget(1.0)).slot_to_expert)
    name, value, values = measure(problem, placement)
    bounds, proofs = prove(problem, time_limit=30.0, caps_L=caps_L)
    assert proofs, "the relaxation should say more here"
    lower = bounds[name]
    solver = {"objective": value, "lower_bound": lower, "gap": (value - lower) / value, "bounds": bounds,
              "values": values}  # fmt: skip
    stated = {
        **state(problem, objective=name, caps_L=caps_L),
        "tokens_digest": tokens_digest(problem),
        "split": "train",
    }
    save_placement(folder / "p.json", placement, solver=solver, problem=stated,
                   certificate=certificate(proofs, by_search=False))  # fmt: skip
    return folder / "p.json", folder / "t.trace"


def test_what_is_true_is_confirmed(solved: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    placement, trace = solved
    assert main(["verify", str(placement), "--trace", str(trace)]) == 0
    printed = capsys.readouterr().out
    assert "every claim that can be checked holds" in printed
    assert "REFUTED" not in printed


@pytest.mark.parametrize("words", [
    ["--mode", "coherent", "--top-1"], ["--mode", "coherent"], ["--mode", "allgather"], ["--slots-per-rank", "5"],
    ["--slots-per-rank", "5", "--replica-budget", "global"], ["--slots-per-rank", "9", "--survive", "1"],
    ["--solver", "eplb"], ["--ranks-per-node", "2"], ["--fit", "all"], ["--replica-rule", "hash"],
])  # fmt: skip
def test_every_kind_of_solve_is_confirmed(words: list[str], solved: tuple[Path, Path], tmp_path: Path) -> None:
    """By predicted seconds, the default."""
    _, trace = solved
    if "--top-1" in words:
        save_trace(tmp_path / "one.trace", load_trace(trace).primary())
        trace, words = tmp_path / "one.trace", words[:-1]
    out = tmp_path / "p.json"
    assert main(["solve", str(trace), "--ranks", "4", *words, "--time-limit", "0.6", "--out", str(out)]) == 0
    assert main(["verify", str(out), "--trace", str(trace), "--json", str(tmp_path / "v.json")]) == 0
    assert json.loads((tmp_path / "v.json").read_text())["verified"] is True


def test_loads_are_verified_too(tmp_path: Path) -> None:
    load_LE = np.random.default_rng(0).integers(1, 100, (3, 12))
    save_load(tmp_path / "l.npz", LoadStats(load_LE))
    out = tmp_path / "p.json"
    words = ["solve", str(tmp_path / "l.npz"), "--ranks", "4", "--slots-per-rank", "4", "--time-limit", "0.5"]
    assert main([*words, "--out", str(out)]) == 0
    assert main(["verify", str(out), "--trace", str(tmp_path / "l.npz")]) == 0


def refuted(document: Any, trace: Path) -> list[str]:
    """Names of the claims that are refuted."""
    return [claim.about for claim in check_claims(document, load_trace(trace).split("train")) if claim.holds is False]


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        (lambda d: d["solver"].update(objective=d["solver"]["objective"] * 0.999), "objective (traffic)"),
        (lambda d: d["solver"].update(lower_bound=d["solver"]["lower_bound"] * 1.001), "lower bound"),
        (lambda d: d["solver"]["bounds"].update(seconds=1.0), "bound on seconds"),
        (lambda d: d["solver"]["values"].update(imbalance=1.0), "imbalance"),
        (lambda d: d["solver"].update(gap=0.0), "gap"),
        (lambda d: d["certificate"].update(proofs=[]), "lower bound"),
        (lambda d: d["problem"].update(caps=[1.0, 1.0]), "load caps"),
        (lambda d: d["problem"].update(tokens_digest="sha256:0"), "tokens"),
        (lambda d: d["slot_to_expert"][0].__setitem__(0, d["slot_to_expert"][0][1]), "placement"),
        (lambda d: d["slot_to_expert"][0].reverse() or d["slot_to_expert"][0].insert(0, d["slot_to_expert"][0].pop()),
         "objective (traffic)"),
    ],
)  # fmt: skip
def test_lies_are_refuted(change: Any, claim: str, solved: tuple[Path, Path]) -> None:
    """Each kind of claim by itself."""
    placement, trace = solved
    document = json.loads(placement.read_text())
    assert refuted(document, trace) == []
    change(document)
    assert claim in refuted(document, trace)


@pytest.mark.parametrize("change", [
    lambda proof: proof.update(h="AAAA"), lambda proof: proof.update(mu=[-1.0]), lambda proof: proof.update(first=9),
    lambda proof: proof.update(layers=2), lambda proof: proof.update(h_scale=float("inf")),
    lambda proof: proof.pop("z"), lambda proof: proof.update(triangles={"triples": [[0, 0, 1]], "weights": [1.0]}),
    lambda proof: proof.update(triangles={"triples": [[0, 1, 2]], "weights": [-1.0]}),
])  # fmt: skip
def test_damaged_certificates_are_refused(change: Any, solved: tuple[Path, Path]) -> None:
    """Never a traceback, never a proof."""
    check_refusal(change, *solved)


def check_refusal(change: Any, placement: Path, trace: Path) -> None:
    """A file is not read whose first proof was changed."""
    document = json.loads(placement.read_text())
    change(document["certificate"]["proofs"][0])
    with pytest.raises(FormatError):
        check_claims(document, load_trace(trace).split("train"))


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_a_certificate_proves_whatever_it_says(seed: int, solved: tuple[Path, Path]) -> None:
    """Random multipliers prove less, never more than the best placement has."""
    placement, trace = solved
    document, rng = json.loads(placement.read_text()), np.random.default_rng(seed)
    tokens, statement = load_trace(trace).split("train"), Statement.from_document(document["problem"])
    for proof in copy.deepcopy(document["certificate"]["proofs"]):
        proof["h_scale"] *= float(rng.uniform(-2, 3))
        proof["mu"] = [float(rng.uniform(0, 3)) * mu for mu in proof["mu"]]
        size = 16 * proof["layers"]
        proof["triangles"] = {"triples": [rng.permutation(size)[:3].tolist() for _ in range(9)],
                              "weights": rng.uniform(0, 0.1, 9).tolist()}  # fmt: skip
        found = proven(statement, tokens, statement.slots_R, [proof])
        assert found["traffic"] <= document["solver"]["objective"] + 1e-9


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_a_certificate_with_replicas_proves_whatever_it_says(seed: int, with_replicas: tuple[Path, Path]) -> None:
    """As it was written it is confirmed; with other multipliers it never proves more than the placement has."""
    placement, trace = with_replicas
    document, rng = json.loads(placement.read_text()), np.random.default_rng(seed)
    assert refuted(document, trace) == []
    proofs = document["certificate"]["proofs"]
    assert proofs
    assert all(len(proof["seats"]) == 16 and proof["pieces"] == "subsets" for proof in proofs)
    tokens, statement = load_trace(trace).split("train"), Statement.from_document(document["problem"])
    document["certificate"]["proofs"] = []
    assert "lower bound" in refuted(document, trace)
    for proof in copy.deepcopy(proofs):
        proof["h_scale"] *= float(rng.uniform(-2, 3))
        proof["seats"] = (np.array(proof["seats"]) * rng.uniform(-2, 3, 16)).tolist()
        proof["pieces"] = str(rng.choice(["subsets", "inverse"]))
        found = proven(statement, tokens, statement.slots_R, [proof])
        assert found["traffic"] <= document["solver"]["objective"] + 1e-9


def test_certificates_of_an_older_kind_still_count(with_replicas: tuple[Path, Path]) -> None:
    """Pieces by expert, and redundant slots bounded by the best partners of a copy: less, but not refused."""
    placement, trace = with_replicas
    document = json.loads(placement.read_text())
    for proof in document["certificate"]["proofs"]:
        proof.pop("pieces")
        proof.pop("seats")
        proof["mu"] = []
    tokens, statement = load_trace(trace).split("train"), Statement.from_document(document["problem"])
    found = proven(statement, tokens, statement.slots_R, document["certificate"]["proofs"])
    assert 1 <= found["traffic"] <= document["solver"]["objective"]


@pytest.mark.parametrize("change", [
    lambda proof: proof.update(seats=proof["seats"][1:]), lambda proof: proof.update(pieces="others"),
    lambda proof: proof["seats"].__setitem__(0, float("inf")), lambda proof: proof.update(h_scale=1e200),
    lambda proof: proof["seats"].__setitem__(3, -1e300), lambda proof: proof.update(seats=None),
    lambda proof: proof.update(h="AAAA"), lambda proof: proof.update(z=[]),
])  # fmt: skip
def test_damaged_certificates_with_replicas_are_refused(change: Any, with_replicas: tuple[Path, Path]) -> None:
    check_refusal(change, *with_replicas)


ODD = (None, "x", -1, 0, [], {}, True, float("nan"), float("inf"), 10**30, [["a"]])
"""Values of another kind, or beyond any range."""


def test_odd_values_are_refused_in_a_sentence(solved: tuple[Path, Path], dated_seed: int) -> None:
    """Any entry of a file replaced or left out: claims that do not hold, or one sentence; no claim gets true by it."""
    document = json.loads(solved[0].read_text())
    trace = load_trace(solved[1]).split("train")
    places = [path for path in _paths(document) if path]
    rng, said = np.random.default_rng(dated_seed), []
    for place, odd in itertools.islice(itertools.product(rng.permutation(len(places)), (*ODD, "gone")), 600):
        changed = copy.deepcopy(document)
        *way, last = places[place]
        entry = functools.reduce(lambda inner, key: inner[key], way, changed)
        if odd == "gone":
            entry.pop(last)
        else:
            entry[last] = odd
        try:
            with warnings.catch_warnings(action="error"):
                claims = check_claims(changed, trace) if statement_of(changed) else []
        except FormatError as error:
            said.append(str(error))
            continue
        confirmed = [claim for claim in claims if claim.holds and isinstance(claim.stated, float)]
        assert all(claim.stated == claim.stated for claim in confirmed), (places[place], odd)
    assert said
    assert not [sentence for sentence in said if "Error" in sentence or "\n" in sentence]


def _paths(document: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of all entries, and of the first two of each list."""
    yield before
    pairs = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document[:2] if isinstance(document, list) else [])
    )
    for key, value in pairs:
        yield from _paths(value, (*before, key))


def test_a_file_without_its_problem_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                               solved: tuple[Path, Path]) -> None:  # fmt: skip
    placement, trace = solved
    document = json.loads(placement.read_text())
    del document["problem"]
    (tmp_path / "old.json").write_text(json.dumps(document))
    assert main(["verify", str(tmp_path / "old.json"), "--trace", str(trace)]) == 1
    assert "does not state its problem" in capsys.readouterr().err
