"""Place whole models that a router composes (Composition of Experts, Symbolic-MoE), and adapters over one base.

python examples/04_place_whole_models.py [FOLDER]      # writes requests.npz, requests.trace and models.json there

A request is a "token", the fleet of models one "layer", the models that answer a request its k-set: what keeps a
request on few ranks keeps its prompt and answers there, and what evens out load evens out queues. Ranks differ in
memory.
"""

import sys
from pathlib import Path

import numpy as np

from moeplace.placement.cluster import Cluster
from moeplace.placement.placement import Placement, index_order
from moeplace.placement.placement_file import save_placement
from moeplace.placement.problem import Problem
from moeplace.placement.solve import solve
from moeplace.profiling.imports.canonical import ImportOptions
from moeplace.profiling.imports.sources import import_from
from moeplace.profiling.traces.adapters import separate_adapters
from moeplace.profiling.traces.file import load_trace
from moeplace.profiling.traces.trace import RoutingTrace

GIB = 1 << 30
SKILLS = ("code", "law", "medicine", "mathematics")
MODELS = 24
REQUESTS, ANSWERS = 4096, 3
MEMORY = (160, 160, 80, 80)  # GiB of each rank; a model takes up to 16


def request_log(path: Path, rng: np.random.Generator) -> None:
    """Requests of users, each about one skill; a router picks 3 of the models that know it, rarely others.

    Saved as the interchange: experts (requests, 1, 3), users as sequences, skills as workloads.
    """
    skill_T = np.repeat(rng.integers(len(SKILLS), size=REQUESTS // 8), 8)  # a user's 8 requests are about one skill
    knows = rng.permutation(MODELS).reshape(len(SKILLS), -1)  # models of a skill, in no order that a rank would guess
    score = rng.gumbel(size=(REQUESTS, MODELS)) + np.linspace(0, 1.5, MODELS)
    np.put_along_axis(score, knows[skill_T], np.take_along_axis(score, knows[skill_T], 1) + 4, axis=1)
    chosen = np.argsort(-score, axis=1)[:, None, :ANSWERS]
    user_T = np.arange(REQUESTS) // 8
    np.savez(path, experts=chosen, sequence_ids=user_T, workload=skill_T, workload_names=np.array(SKILLS))


def placed(trace: RoutingTrace, cluster: Cluster) -> Placement:
    """Fit to the requests of half of the users, judge on the others, print both beside index order."""
    train, test = trace.split("train"), trace.split("test")
    problem = Problem.from_trace(train, cluster, objective="traffic", max_imbalance=1.2)
    result = solve(problem, time_limit=8.0, seed=0)
    base = index_order(trace.experts_per_layer, cluster.slots_of_rank, cluster.node_of_rank)
    for name, placement in (("index order", base), ("solved", result.placement)):
        found = problem.evaluate(placement, test)
        print(
            f"{name:12} {found.ranks_per_token:.2f} ranks a request, busiest rank {found.imbalance_mean:.2f} x the mean"
        )
    return result.placement


def main(folder: Path) -> None:
    """Whole models on ranks of different memory, then adapters over one base."""
    rng = np.random.default_rng(0)
    request_log(folder / "requests.npz", rng)
    import_from("npz", folder / "requests.npz", folder / "requests.trace", ImportOptions(num_experts=MODELS))
    model_bytes = rng.choice([14, 16], MODELS) * GIB
    trace = load_trace(folder / "requests.trace").replace(expert_bytes=model_bytes[None])
    print(f"{REQUESTS} requests to {MODELS} models of {model_bytes.sum() / GIB:.0f} GiB, ranks of {MEMORY} GiB")
    slots = [memory * GIB // int(model_bytes.max()) for memory in MEMORY]
    cluster = Cluster.uniform(len(MEMORY), slots_per_rank=slots)
    placement = placed(trace, cluster)
    held_R = np.einsum("e,er->r", model_bytes, placement.copies_LER[0])
    print("GiB held:", [f"{held / GIB:.0f} of {memory}" for held, memory in zip(held_R, MEMORY, strict=True)])
    save_placement(folder / "models.json", placement, solver={"name": "auto"})

    print(
        "\nThe same requests served by adapters of one base model: each skill has weights of its own for what it uses"
    )
    adapters = trace.replace(adapter=trace.workload, adapter_names=trace.workload_names, expert_bytes=None)
    own, keys = separate_adapters(adapters)
    print(f"{int((keys.adapter_LE >= 0).sum())} expert-adapter pairs beside the {MODELS} experts of the base")
    placed(own, Cluster.uniform(4, slots_per_rank=-(-own.num_experts // 4)))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
