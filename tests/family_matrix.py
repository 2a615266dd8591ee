"""What is profiled and served exactly: every MoE family of the installed `transformers`, judged by its plain model.

    python -m tests.family_matrix           writes docs/models.md and runtime/models/recorded.json

A family passes in a mode if, on every number of ranks asked for, under random placements with replicas, its logits
across the border of prefill and decode are those of the plain model (in float64; some families compute parts in
float32, so the tolerance is theirs), and the greedy tokens the same. It passes in profiling if the trace holds the ids
that its experts received. It passes in a quantised form if all that ranks make
of a checkpoint packed by `tests.packers` are, bit by bit, the tensors of the plain checkpoint that it means.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from moeplace.placement.modes import MODES
from moeplace.profiling.errors import MoeplaceError
from moeplace.profiling.recording.recorder import Recorder
from moeplace.profiling.traces.file import load_trace
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.opening import open_model
from tests.model_families import moe_families, plain_logits, save_family
from tests.packers import NotPackableError, quantise_checkpoint
from tests.rank_pool import RankContext, RankPool
from tests.runtime.placements import placement_for

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
RECORD = ROOT / "runtime" / "models" / "recorded.json"
TOLERANCE = 1e-4
"""Of the greatest logit."""
LENGTHS, PROMPTS = (9, 1, 23, 17), (5, 1, 17, 1)
_TABLE_START = "| family | experts | profile | dispatch-combine | allgather | coherent | quantised forms | why not |\n"
PUBLISHED_FORMS = ("fp8", "mxfp4", "awq", "gptq", "compressed-tensors")


@dataclass
class FamilyResult:
    """What came of a family.

    Attributes:
        family: its model type.
        experts: experts per layer, as text.
        profile: "exact" or "no".
        modes: mode -> "exact", "no" or "refused".
        quantised: forms in which its experts may be and are served exactly, with * where they are unpacked.
        reason: why not, where something is not exact.
    """

    family: str
    experts: str = "-"
    profile: str = "no"
    modes: dict[str, str] = field(default_factory=lambda: dict.fromkeys(MODES, "no"))
    quantised: str = "-"
    reason: str = ""

    def row(self) -> str:
        """As a row of the table."""
        marks = [self.profile, *(self.modes[mode] for mode in ("dispatch-combine", "allgather", "coherent"))]
        cells = [f"`{self.family}`", self.experts, *marks, self.quantised, self.reason.replace("|", "/")]
        return f"| {' | '.join(cells)} |\n"


def judge_family(
    pool: RankPool, family: str, folder: Path, *, sizes: Sequence[int], seed: int, forms: Sequence[str] = ()
) -> FamilyResult:
    """Save a small checkpoint of a family, then profile and serve it; in these quantised forms too."""
    result = FamilyResult(family)
    rng = np.random.default_rng(seed)
    try:
        save_family(family, folder, seed=seed)
        sequences = [rng.integers(1, 96, length).tolist() for length in LENGTHS]
        expected = [block.double().numpy() for block in plain_logits(folder, sequences)]
    except Exception as error:
        result.reason = f"cannot be built small: {_sentence(error)}"
        return result
    result.profile, why = judge_profile(folder)
    result.reason = why
    try:
        checkpoint = Checkpoint(folder)
        model = open_model(checkpoint)
    except MoeplaceError as error:
        result.modes = dict.fromkeys(MODES, "refused")
        result.reason = _reason(error)
        return result
    experts = checkpoint.family.forms[0].experts
    result.experts = f"{experts.num_experts}{f' + {experts.num_null} zero' if experts.num_null else ''}"
    for mode in MODES:
        if mode == "coherent" and getattr(model, "reason", ""):
            result.modes[mode], result.reason = "refused", result.reason or f"coherent: {model.reason}"  # type: ignore[union-attr]
            continue
        wrong = [why for size in sizes if (why := judge_mode(pool, folder, sequences, expected, mode, size, seed))]
        result.modes[mode] = "no" if wrong else "exact"
        result.reason = f"{mode}: {wrong[0]}" if wrong else result.reason
    if forms:
        result.quantised, why = judge_forms(family, folder / "quantised", forms, seed=seed)
        result.reason = why or result.reason
    return result


def judge_forms(family: str, folder: Path, forms: Sequence[str], *, seed: int) -> tuple[str, str]:
    """Forms in which the experts of a family are read exactly, with * where they are unpacked; and what is wrong."""
    save_family(family, folder / "source", seed=seed, intermediate_size=64, moe_intermediate_size=64)
    marks, wrong = [], ""
    for form in forms:
        packed, plain = folder / form, folder / f"{form} plain"
        try:
            quantise_checkpoint(folder / "source", form, packed, plain, seed=seed)
        except NotPackableError:
            continue
        try:
            theirs, expected = Checkpoint(packed), Checkpoint(plain)
            wrong = _first_difference(theirs, expected) or wrong
        except MoeplaceError as error:
            wrong = f"{form}: {_reason(error)}"
        else:
            marks.append(form if theirs.layout is not None else f"{form}*")
    return ("-", wrong) if wrong else (", ".join(marks) or "-", "")


def _first_difference(packed: Checkpoint, plain: Checkpoint) -> str:
    """The first tensor that is another one in two checkpoints, experts by what a rank multiplies with; blank = none."""
    for layer, count in enumerate(plain.experts_per_layer.tolist()):
        for expert in range(count):
            parts, layout = packed.expert(layer, expert), packed.layout
            if layout is not None:
                made = {matrix: layout.make(matrix, parts, torch.float64) for matrix in layout.matrices}
                parts = made | {name: parts[name] for name in layout.biases}
            expected = plain.expert(layer, expert)
            differing = [
                name for name, value in expected.items() if not torch.equal(parts[name].double(), value.double())
            ]
            if differing or set(parts) != set(expected):
                return f"{differing} of expert {expert} of MoE layer {layer} differ"
    others = sorted(plain.other_names())
    if others != sorted(packed.other_names()):
        return "its other tensors have other names"
    values = ((name, packed.stored.slice_of(name)[...], plain.stored.slice_of(name)[...]) for name in others)
    return next(
        (f"{name} differs" for name, ours, theirs in values if not torch.equal(ours.double(), theirs.double())), ""
    )


def judge_mode(
    pool: RankPool, folder: Path, sequences: Any, expected: Any, mode: str, size: int, seed: int
) -> str | None:
    """What is wrong with a family in a mode on some ranks, None = nothing."""
    try:
        answers = pool.run(score_family, folder, sequences, mode, seed + size, size=size)
    except AssertionError as error:
        return f"fails on {size} ranks ({_sentence(error)})"
    for rank, logits in enumerate(answers):
        for ours, plain in zip(logits, expected, strict=True):
            scale = np.abs(plain).max()
            if np.abs(ours - plain).max() > TOLERANCE * scale or (ours.argmax(1) != plain.argmax(1)).any():
                off = np.abs(ours - plain).max() / scale
                return f"rank {rank} of {size} has other logits (off by {off:.1e} of the greatest)"
    return None


def score_family(context: RankContext, folder: Path, sequences: Any, mode: str, seed: int) -> list[np.ndarray]:
    """Logits under a random placement with replicas, on a rank."""
    transformers.logging.disable_progress_bar()
    checkpoint = Checkpoint(folder)
    placement = placement_for(checkpoint, context.size, seed=seed, extra_slots=seed % 3)
    engine = Engine(
        checkpoint,
        placement,
        mode=mode,
        group=context.group(),
        dtype=torch.float64,
        limits=EngineLimits(max_sequences=4 * context.size, max_length=32),
    )
    return [block.double().numpy() for block in engine.score(sequences, prompt_lengths=PROMPTS)]


def judge_profile(folder: Path) -> tuple[str, str]:
    """Whether a trace of a checkpoint holds the ids that its experts received: exact or no, and why not."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    tokens = torch.randint(1, 96, (2, 11), generator=torch.Generator().manual_seed(3))
    received: dict[str, list[np.ndarray]] = {}
    inputs: dict[str, list[np.ndarray]] = {}
    handles = [
        module.register_forward_pre_hook(_spy(name, module, received, inputs), with_kwargs=True)
        for name, module in model.named_modules()
        if _holds_experts(name, module)
    ]
    handles += [
        m.register_forward_pre_hook(_note_input(n, inputs)) for n, m in model.named_modules() if n.endswith("mlp")
    ]
    path = folder / "family.trace"
    try:
        with torch.inference_mode(), Recorder(model, path):
            model(input_ids=tokens, use_cache=False)
    except MoeplaceError as error:
        return "no", f"profile: {_sentence(error)}"
    finally:
        for handle in handles:
            handle.remove()
    trace = load_trace(path)
    experts = int(trace.experts_per_layer[0]) + trace.null_experts
    if trace.num_layers != len(received):
        return "no", f"profile: {trace.num_layers} layers in the trace, {len(received)} ran"
    for layer, calls in enumerate(received.values()):
        recorded = one_hot(np.asarray(trace.topk_ids[:, layer]), experts)
        if len(calls) != 1 or not np.array_equal(recorded, one_hot(calls[0], experts)):
            return "no", f"profile: the ids of MoE layer {layer} are not those that its experts received"
    return "exact", ""


def one_hot(ids_TK: np.ndarray, experts: int) -> np.ndarray:
    """(T, E) how often each token has each expert; ids outside count nowhere."""
    counts = np.zeros((len(ids_TK), experts + 1), np.int64)
    np.add.at(
        counts, (np.arange(len(ids_TK))[:, None], np.where((ids_TK >= 0) & (ids_TK < experts), ids_TK, experts)), 1
    )
    return counts[:, :experts]


def _holds_experts(name: str, module: Any) -> bool:
    """Routed experts, by other signs than the recorder goes by: their names, and JetMoE's first product."""
    last = name.rpartition(".")[2]
    if last == "experts":
        return "attention" not in name
    return name.endswith(".mlp.input_linear") and module.weight.ndim == 3


def _note_input(name: str, inputs: dict[str, list[np.ndarray]]) -> Any:
    def note(_: Any, args: tuple[Any, ...]) -> None:
        inputs[name] = [args[0].reshape(-1, args[0].shape[-1]).numpy().copy()]

    return note


def _spy(name: str, module: Any, received: dict[str, list[np.ndarray]], inputs: dict[str, list[np.ndarray]]) -> Any:
    def spy(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [*args, *kwargs.values()]
        whole = [v for v in values if isinstance(v, torch.Tensor) and not v.is_floating_point()]
        if whole:
            ids = whole[0].reshape(-1, whole[0].shape[-1]).numpy()
        elif name.endswith("input_linear"):
            ids = _ids_of_sorted_rows(inputs[name.rpartition(".")[0]][-1], values[0].numpy(), values[1])
        else:  # Llama 4: a block of rows for each expert, zero where a token is not its own
            blocks = values[0].reshape(module.num_experts, -1, values[0].shape[-1])
            ids = np.stack([np.flatnonzero(row) for row in blocks.abs().sum(2).T.numpy()])
        received.setdefault(name, []).append(ids.copy())

    return spy


def _ids_of_sorted_rows(hidden_TD: np.ndarray, rows: np.ndarray, sizes: list[int]) -> np.ndarray:
    """JetMoE's experts get rows sorted by expert and how many each gets; tokens are known by their hidden rows."""
    expert_N = np.repeat(np.arange(len(sizes)), sizes)
    token_N = np.array([np.flatnonzero((hidden_TD == row).all(1))[0] for row in rows])
    return np.stack([expert_N[token_N == token] for token in range(len(hidden_TD))])


def _sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:110]


def _reason(error: MoeplaceError) -> str:
    """What a refusal gives as its reason."""
    return str(error).partition("(because ")[2].partition("); supported")[0] or _sentence(error)


def table(results: Sequence[FamilyResult]) -> str:
    """The table of the page."""
    return _TABLE_START + "|---|---|---|---|---|---|---|---|\n" + "".join(result.row() for result in results)


def rows_of_page() -> dict[str, str]:
    """Family -> its row on the page."""
    lines = PAGE.read_text(encoding="utf-8").splitlines(keepends=True)
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


def write(results: Sequence[FamilyResult]) -> None:
    """Renew page and record."""
    release = ".".join(transformers.__version__.split(".")[:2])
    page = PAGE.read_text(encoding="utf-8")
    head = page[: page.index(_TABLE_START)]
    PAGE.write_text(head + table(results), encoding="utf-8")
    passed = {r.family: [mode for mode in MODES if r.modes[mode] == "exact"] for r in results}
    families = {family: modes for family, modes in passed.items() if modes}
    RECORD.write_text(json.dumps({"transformers": release, "families": families}, indent=1) + "\n", encoding="utf-8")


def judge_all(pool: RankPool, folder: Path, families: Sequence[str], *, sizes: Sequence[int]) -> list[FamilyResult]:
    """All families, one after the other."""
    results = []
    for family in families:
        results.append(judge_family(pool, family, folder / family, sizes=sizes, seed=0, forms=PUBLISHED_FORMS))
        print(results[-1].row(), end="", flush=True, file=sys.stderr)
    return results


if __name__ == "__main__":
    ranks = RankPool(4)
    with tempfile.TemporaryDirectory() as temporary:
        write(judge_all(ranks, Path(temporary), sys.argv[1:] or moe_families(), sizes=(1, 2, 3, 4)))
    ranks.close()
