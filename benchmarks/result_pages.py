"""Tables of measured figures, and the pages that show them: README, `docs/comparison.md`, `benchmarks/results`.

A figure is the median over the seeds with the least and the greatest beside it. What was aimed at and not reached is
said in words. Blocks between `<!-- name -->` and `<!-- /name -->` of a page are written; the rest of it is not touched.
"""

import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

WORDS = {
    "ranks_per_token": "ranks per token", "nodes_per_token": "nodes per token", "copies_per_token": "copies per token",
    "stay_rate": "stay rate", "imbalance_mean": "imbalance",
}  # fmt: skip
MORE_IS_BETTER = ("stay_rate",)
RULES = ("moeplace", "nearest-static", "random", "hash")


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """`median (least to greatest)`; one number where they print alike."""
    least, middle, most = (format(each, form) for each in (min(values), statistics.median(values), max(values)))
    return middle if least == most else f"{middle} ({least} to {most})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def reached(row: dict[str, Any]) -> str:
    """Whether the medians reach every aim of a row, with the aims."""
    if not row["goal"]:
        return ""
    aims, all_reached = [], True
    for name, goal in zip(row["figures"], row["goal"], strict=False):
        median = statistics.median(one[name] for one in row["solved"])
        more = name in MORE_IS_BETTER
        all_reached &= median >= goal if more else median <= goal
        aims.append(f"{WORDS[name]} {'>=' if more else '<='} {goal:g}")
    return f"{'reached' if all_reached else '**not reached**'}: {', '.join(aims)}"


def proven(row: dict[str, Any]) -> str:
    """The best bound of all runs, each of which holds: on the first figure, or the gap where nodes are weighed in."""
    if "--ranks-per-node" in row["flags"]:
        return f"gap {min(run['gap'] for run in row['solver']):.1%} of the objective"
    bound = max(run["lower_bound"] for run in row["solver"])
    return f"<= {1 - bound:.3f}" if row["figures"][0] == "stay_rate" else f">= {bound:.3f}"


def solver_table(part: dict[str, Any]) -> str:
    """One row an instance: baselines, solved with its spread, bound, aim, flags."""
    rows = []
    for row in part["rows"]:
        names = row["figures"]
        shown = " / ".join(WORDS[name] for name in names)
        base = [
            " / ".join(f"{row['baselines'][name][figure]:.3f}" for figure in names) if name in row["baselines"] else ""
            for name in ("index order", "EPLB")
        ]
        solved = " / ".join(spread([one[name] for one in row["solved"]]) for name in names)
        rows.append([f"{row['name']}: {shown}", *base, f"**{solved}**", proven(row), reached(row), f"`{row['flags']}`"])
    for load in part["loads"]:
        took = f"**{load['imbalance']:.4f}** in {load['seconds'] * 1e3:.0f} ms"
        rows.append([f"{load['name']} (loads only): imbalance", "", "", took, ">= 1", "", "`solver_figures.py loads`"])
    header = ("what, held-out", "index order", "DeepSeek's EPLB", "solved, by moeplace's replica rule",
              "proven on the fitted tokens", "aim", "flags of `moeplace solve`")  # fmt: skip
    return table(header, rows)


def rules_table(part: dict[str, Any]) -> str:
    """What replicas are worth where another rule chooses among them: rows with replicas, by rule."""
    rows = []
    for row in part["rows"]:
        if not all("by_replica_rule" in one for one in row["solved"]):
            continue
        cells = []
        for rule in RULES:
            found = [one["by_replica_rule"][rule] for one in row["solved"]]
            cells.append(
                " at ".join(spread([one[name] for one in found]) for name in ("ranks_per_token", "imbalance_mean"))
            )
        rows.append([row["name"], *cells])
    header = ("ranks per token at imbalance", *(f"`{rule}`" for rule in RULES))
    return table(header, rows) if rows else ""


def solved_with(part: dict[str, Any]) -> str:
    """How the placements of the replays were found."""
    flags = {one["top_k"]: one["solve"] for one in part["runs"]}
    return "; ".join(f"top-{top_k} solved by `moeplace solve t.trace {flags[top_k]}`" for top_k in sorted(flags))


def replay_table(part: dict[str, Any]) -> str:
    """One row a run: seconds of a step over the seeds, speedup, error of the prediction."""
    rows = []
    for top_k in sorted({one["top_k"] for one in part["runs"]}):
        same = [one for one in part["runs"] if one["top_k"] == top_k]
        for index, run in enumerate(same[0]["runs"]):
            found = [one["runs"][index] for one in same]
            last, goal = index == len(same[0]["runs"]) - 1, same[0]["goal"]
            speedups = [each["speedup"] for each in found]
            met = "reached" if statistics.median(speedups) >= goal else "**not reached**"
            name = "index order" if run["placement"] == "index-order" else "solved"
            rows.append(
                [
                    f"top-{top_k}, {name}, {run['mode']}{' ' + run['form'] if run['form'] else ''}",
                    spread([each["seconds_per_step"] for each in found]), spread(speedups, ".2f"),
                    spread([100 * each["prediction_error"] for each in found], "+.1f"),
                    f"{found[0]['bytes_inter_node'] / 1e6:.2f}", f"{met}: {goal:g}" if last else "",
                ]
            )  # fmt: skip
    header = ("run", "s per step", "speedup", "prediction error, %", "MB between hosts", "aim of the speedup")
    return table(header, rows)


def elastic_table(part: dict[str, Any]) -> str:
    """One row a mode: requests of all seeds, spread of the rest."""
    rows = []
    for mode in dict.fromkeys(one["mode"] for one in part["runs"]):
        found = [one for one in part["runs"] if one["mode"] == mode]
        kills = [seconds for one in found for seconds in one["seconds_from_kill_to_token"]]
        ratios = [one["worst_step_ratio"] for one in found]
        goal = part["goal"]["worst_step_ratio"]
        met = "reached" if max(ratios) <= goal else "**not reached**"
        least = all(one["bytes_moved"] == one["bytes_lower_bound"] for one in found)
        rows.append(
            [
                mode, *(str(sum(one[name] for one in found)) for name in ("requests", "lost", "changed")),
                spread([one["median_step_seconds"] * 1e3 for one in found], ".0f"), spread(ratios, ".2f"),
                spread([one["throughput_ratio"] for one in found], ".2f"), spread(kills, ".2f"),
                "the proven least" if least else "above the proven least",
                f"{met}: worst step <= {goal:g} in every run",
            ]
        )  # fmt: skip
    header = ("mode", "requests", "lost", "changed", "median step, ms", "worst step moving / median",
              "throughput moving", "kill to token, s", "bytes of joins and leaves", "aim")  # fmt: skip
    return table(header, rows)


def says(known: dict[str, Any], *, seeds: bool = True) -> str:
    """The conditions of a part, a sentence."""
    with_seeds = f", seeds {', '.join(map(str, known['seeds']))}" if seeds else ""
    return (
        f"Measured {known['date']} at commit {known['commit']} on {known['cores']} cores (load average "
        f"{known['load_before']:g} before), Python {known['python']}, numpy {known['numpy']}, numba {known['numba']}, "
        f"torch {known['torch']}{with_seeds}."
    )


def tables(figures: dict[str, Any]) -> Iterator[str]:
    """Every part that was measured, with its conditions."""
    spread_words = "Median over the seeds (least to greatest)."
    if "solver" in figures:
        part = figures["solver"]
        yield (
            "Placements of DeepSeek-V2-Lite's recorded routing (26 MoE layers, 64 experts, top-6), fitted to even "
            f"sequences, judged on odd ones. {spread_words} {says(part['conditions'])}"
        )
        yield solver_table(part)
        if rules := rules_table(part):
            yield "The same placements where an engine's rule chooses the replica ([rules](model.md#replica-rules)):"
            yield rules
    if "replay" in figures:
        part = figures["replay"]
        yield (
            f"`bench replay` between {part['hosts']} emulated hosts of 2 ranks, {part['link']}, batch 256, "
            f"hidden 2048, bfloat16; {solved_with(part)}. {spread_words} {says(part['conditions'])}"
        )
        yield replay_table(part)
    if "elastic" in figures:
        part = figures["elastic"]
        yield f"`moeplace bench elastic {part['flags']}`. {spread_words} {says(part['conditions'])}"
        yield elastic_table(part)


def replaced(text: str, name: str, body: str) -> str:
    """`text` with what stands between the marks of a block.

    Raises:
        ValueError: there is not exactly one such block.
    """
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    new, count = pattern.subn(lambda marks: f"{marks[1]}{body}\n{marks[2]}", text)
    if count != 1:
        raise ValueError(f"{count} blocks are called {name}, there must be one")
    return new


def write_pages(root: Path, figures: dict[str, Any]) -> list[Path]:
    """Write README, the comparison and a dated page; the paths that were written."""
    readme, comparison = root / "README.md", root / "docs" / "comparison.md"
    all_tables = "\n\n".join(tables(figures))
    dates = [part["conditions"]["date"] for part in figures.values()]
    page = root / "benchmarks" / "results" / f"all_{platform_word(figures)}_{max(dates)}.md"
    shown = all_tables.replace("](model.md", "](docs/model.md")
    link = (
        f"All figures, and what earlier pages say of what did not work: [{page.name}](benchmarks/results/{page.name})"
    )
    older = "[benchmarks](docs/benchmarks.md)"
    text = replaced(readme.read_text(encoding="utf-8"), "results", f"{shown}\n\n{link}, {older}.")
    if "quickstart" in figures:
        text = replaced(text, "output", f"```\n{figures['quickstart']['output']}\n```")
    readme.write_text(text, encoding="utf-8")
    measured = replaced(comparison.read_text(encoding="utf-8"), "measured", all_tables)
    comparison.write_text(measured, encoding="utf-8")
    command = "python benchmarks/renew_results.py --trace routing.npz"
    head = f"# All figures, {max(dates)}\n\nWritten by `{command}` from `figures.json` beside this page.\n\n"
    page.write_text(head + all_tables.replace("](model.md", "](../../docs/model.md") + "\n", encoding="utf-8")
    return [readme, comparison, page]


def platform_word(figures: dict[str, Any]) -> str:
    """What the file name says of the machine."""
    return f"cpu{next(iter(figures.values()))['conditions']['cores']}"
