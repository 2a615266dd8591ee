"""`moeplace stats`: what a trace says about skew, affinity, stability, locality, and what placement would gain."""

import argparse
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from moeplace.launch.progress import progress
from moeplace.launch.solving.verdict import add_verdict_arguments, describe_judgement, judge_trace, names_cluster

if TYPE_CHECKING:
    from moeplace.profiling.scores.recordings import RecordingCounts

HELP = "what a trace says: skew, affinity, stability, locality; what placement would gain on a cluster"
EXAMPLE = "moeplace stats t.trace --ranks 8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_score_arguments(parser)
    parser.add_argument("--compare", metavar="T2", help="a later trace: has the routing drifted from T to T2, and how "
                        "much of a placement's gain survives it?")  # fmt: skip
    parser.add_argument("--no-locality", action="store_true", help="leave out SRP and SCH")
    add_verdict_arguments(parser)


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Which traces, and where to."""
    parser.add_argument(
        "traces", metavar="T", nargs="+", help="trace file; several recordings of one model are counted one by one and "
        "added up: skew, affinity and stability of all of them",
    )  # fmt: skip
    parser.add_argument("--json", metavar="F", help="write all figures, by layer and expert, to F")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of shuffles, bootstraps and searches (0)"
    )


def run(args: argparse.Namespace) -> int:
    if len(args.traces) > 1:
        return _run_several(args)
    return _run_one(args)


def _run_several(args: argparse.Namespace) -> int:
    from moeplace.profiling.errors import InputError
    from moeplace.profiling.scores.recordings import count_file

    if args.compare or names_cluster(args):
        flag = "--compare" if args.compare else "a cluster"
        raise InputError(
            f"{flag} needs one trace, not {len(args.traces)}: join them by `moeplace import --from npz A B --out T`"
        )
    recordings = [(number, path, path) for number, path in enumerate(args.traces)]
    report_recordings(args, (count_file(args.seed, recording) for recording in recordings))
    return 0


def report_recordings(args: argparse.Namespace, found: "Iterable[RecordingCounts]") -> None:
    """Add up the counts of `args.traces`, in whatever order they come, print and write the scores."""
    from moeplace.profiling.files import require_folder_of, write_json
    from moeplace.profiling.scores.recordings import summarize_recordings

    require_folder_of(args.json)
    whole: RecordingCounts | None = None
    with progress("recordings") as report:
        for done, counts in enumerate(found, 1):
            whole = counts if whole is None else whole.merge(counts)
            report(done / len(args.traces))
    assert whole is not None
    document = summarize_recordings(whole, seed=args.seed)
    if args.json:
        write_json(args.json, document)
    print("\n\n".join(sections(f"{len(args.traces)} recordings", document)))


def _run_one(args: argparse.Namespace) -> int:
    from moeplace.profiling.files import require_folder_of, write_json
    from moeplace.profiling.scores.drift import measure_drift
    from moeplace.profiling.scores.summary import drift_document, summarize
    from moeplace.profiling.traces.file import load_trace

    require_folder_of(args.json)
    trace = load_trace(args.traces[0])
    other = load_trace(args.compare) if args.compare else None
    with progress("scores") as report:
        document = summarize(trace, seed=args.seed, locality=not args.no_locality)
        report(0.5 if other is not None else 1.0)
        if other is not None:
            document["drift"] = drift_document(measure_drift(trace, other, seed=args.seed))
            report(1.0)
    if names_cluster(args):
        with progress("verdict") as report:
            document |= judge_trace(args, trace, other, report)
    if args.json:
        write_json(args.json, document)
    print("\n\n".join(sections(args.traces[0], document)))
    return 0


def sections(name: str, document: dict[str, Any]) -> Iterator[str]:
    """The parts of the report for people, in order; a further part is one more `yield`."""
    yield describe_trace(name, document["trace"])
    if len(document.get("recordings", ())) > 1:
        yield describe_recordings(document)
    yield describe_scores(document)
    if document["affinity"].get("by_workload"):
        yield describe_workloads(document)
    if document.get("adapters"):
        yield describe_adapters(document["adapters"])
    if document.get("srp"):
        yield describe_routing(document["srp"])
    if document.get("sch"):
        yield describe_caches(document["sch"])
    if document.get("drift"):
        yield describe_drift(document["drift"])
    yield from describe_judgement(document)


def describe_trace(name: str, shape: dict[str, Any]) -> str:
    """Two or three lines: sizes and notes."""
    sequences = "no sequence ids" if shape["sequences"] is None else f"{shape['sequences']} sequences"
    decode = f", {shape['decode_tokens']} of them decoded" if shape["decode_tokens"] else ""
    lines = [
        f"{name}: {shape['tokens']} tokens in {sequences}{decode}",
        f"{shape['model'] or 'model unnamed'}: {shape['layers']} MoE layers of {shape['num_hidden_layers']}, "
        f"{shape['experts']} experts, top-{shape['top_k']}",
    ]
    mean_k = sum(shape["mean_top_k_by_layer"]) / len(shape["mean_top_k_by_layer"])
    if mean_k < shape["top_k"] - 1e-9:
        null = f"; {shape['null_share']:.1%} of the choices are null experts" if shape["null_share"] else ""
        lines.append(f"{mean_k:.3f} experts per token and layer in the mean{null}")
    return "\n".join([*lines, *(f"note: {note}" for note in shape["notes"])])


def describe_recordings(document: dict[str, Any]) -> str:
    """Sizes of every recording, and how far its load is from that of all."""
    from moeplace.launch.tables import format_table

    windows = document["stability"]["windows"]
    columns = (document["recordings"], windows["skew_mean"], windows["load_tv_from_all"])
    rows = [
        [what["name"], what["tokens"], what["sequences"], skew, distance]
        for what, skew, distance in zip(*columns, strict=True)
    ]
    return format_table(["recording", "tokens", "sequences", "load skew", "load against all (TV)"], rows)


def describe_scores(document: dict[str, Any]) -> str:
    """Skew, affinity, co-activation and stability, one figure a line."""
    from moeplace.launch.tables import Cell, format_table

    load, pairs, windows = document["load"], document["affinity"], document["stability"]["windows"]
    stability = document["stability"]
    rows: list[list[Cell]] = [
        ["load skew (max / mean), mean over layers", load["skew_mean"]],
        ["load skew, worst layer", load["skew_worst"]],
        ["load entropy / log2 E", load["entropy_mean"]],
        ["affinity between layers, bits", pairs["bits"]],
        [f"... after shuffling{_inside(document)} (chance)", pairs["control_bits"]],
        ["co-activation beyond popularity (TV)", document["coactivation"]["excess_tv_mean"]],
    ]
    if "train_test" in stability:
        rows.append(["load, train against test (TV)", stability["train_test"]["load_tv"]])
        rows.append(["... random halves (chance)", stability["random_halves"]["load_tv"]])
        rows.append(["transitions, train against test (TV)", stability["train_test"]["transitions_tv"]])
        rows.append(["... random halves (chance)", stability["random_halves"]["transitions_tv"]])
    if "prefill_decode" in stability:
        rows.append(["load, prefill against decode (TV)", stability["prefill_decode"]["load_tv"]])
    are = windows.get("are", "windows")
    rows.append([f"load, {len(windows['skew_mean'])} {are} against all (TV), worst", max(windows["load_tv_from_all"])])
    before = max(windows["load_tv_from_previous"], default=None)
    rows.append([f"load, {are.removesuffix('s')} against the one before (TV), worst", before])
    if load["unused_experts"]:
        rows.append(["experts without a token", load["unused_experts"]])
    legend = (
        "(skew 1 = even; affinity above chance = locality that a placement can use; TV: 0 = the same, 1 = nothing in "
        "common, near chance = stable)"
    )
    return f"{format_table(['score', 'value'], rows)}\n{legend}"


def _inside(document: dict[str, Any]) -> str:
    """Where tokens were shuffled, if not over the whole trace."""
    return " in each recording" if document["stability"]["windows"].get("are") == "recordings" else ""


def describe_workloads(document: dict[str, Any]) -> str:
    """Affinity and load of every workload against the others."""
    from moeplace.launch.tables import format_table

    tokens, distance = document["trace"]["workloads"], document["stability"].get("workloads", {})
    rows = [
        [name, tokens[name], score["bits"], score["control_bits"], distance.get(name)]
        for name, score in document["affinity"]["by_workload"].items()
    ]
    return format_table(["workload", "tokens", "affinity bits", "by chance", "load against the rest (TV)"], rows)


def describe_adapters(scores: dict[str, Any]) -> str:
    """Load and affinity of every adapter."""
    from moeplace.launch.tables import format_table

    keys = ("tokens", "skew_mean", "experts_used_mean", "bits", "control_bits", "load_tv_from_rest")
    header = ["adapter", "tokens", "load skew", "experts used", "affinity bits", "by chance", "load against the rest"]
    return format_table(header, [[name, *(score[key] for key in keys)] for name, score in scores.items()])


def describe_routing(scores: list[dict[str, Any]]) -> str:
    """SRP by segment length."""
    from moeplace.launch.tables import format_table

    rows = [
        [s["length"], s["srp"], f"{s['interval'][0]:.4f}..{s['interval'][1]:.4f}", s["threshold"], s["size_ratio"]]
        for s in scores
    ]
    table = format_table(["segment", "SRP", "95 % interval", "threshold", "experts taken / used"], rows)
    meaning = "SRP: how well one set of experts per segment fits its tokens; near 1 the routing repeats"
    return f"{table}\n({meaning}; on {scores[0]['tokens']} tokens)"


def describe_caches(scores: dict[str, Any]) -> str:
    """Hit rates of a cache of rho x K experts per layer, SCH and the baselines."""
    from moeplace.launch.tables import Cell, format_table

    rows: list[list[Cell]] = []
    for score in scores["policies"]:
        name = f"SCH {score['length']}" if score["policy"] == "segment" else score["policy"]
        rows.append([name, *score["layer_mean"], *score["model"]])
    header = ["cache", *(f"{r:g}K a layer" for r in scores["ratios"]), *(f"{r:g}KL shared" for r in scores["ratios"])]
    first = scores["policies"][0]
    tokens = (
        "(hit rates, 1 = no expert is ever fetched; SCH n: a cache that knows the next n tokens; 2K: twice top-k "
        "experts a layer, 2KL shared: one cache of twice top-k x layers for all of them; "
        f"on {first['tokens']} tokens, shared cache on {first['model_tokens']})"
    )
    return f"{format_table(header, rows)}\n{tokens}"


def describe_drift(drift: dict[str, Any]) -> str:
    """Distances with their thresholds, and the verdict."""
    from moeplace.launch.tables import format_table

    rows = [
        [name, value, drift["threshold"][name], drift["p_value"][name]] for name, value in drift["distance"].items()
    ]
    verdict = "the routing has drifted" if drift["is_significant"] else "no drift beyond chance"
    table = format_table(["distance", "value", "chance", "p"], rows)
    sizes = [f"{drift['tokens'][side]} tokens in {drift['sequences'][side]} sequences" for side in (0, 1)]
    return "\n".join([table, f"{verdict} (compared {sizes[0]} and {sizes[1]})", *drift["notes"]])
