"""Engines' placement files: golden content, round trips, what each format refuses, damaged files."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeplace.placement.engines import ENGINES, read_engine_placement, sidecar_path, write_engine_placement
from moeplace.placement.placement import Placement
from moeplace.profiling.errors import FormatError, InputError, MoeplaceError, MoeplaceWarning
from tests.placement.random_placements import random_placement

SUFFIX = {
    "sglang": ".json",
    "vllm": ".jsonl",
    "trtllm": ".yaml",
    "vllm-ascend": ".json",
    "omni": ".npy",
    "exflow": ".csv",
}
ROWS = [[0, 3, 1, 2, 1, 0], [1, 2, 0, 3, 0, 2]]
SORTED_ROWS = [[0, 1, 3, 0, 1, 2], [0, 1, 2, 0, 2, 3]]
TRACE_ROWS = [[0, 2, 1, 3], [0, 2, 1, 3]]


def toy(rows: list[list[int]] = ROWS) -> Placement:
    """Three decoder layers, the first dense; four experts on two ranks."""
    slots = len(rows[0]) // 2
    return Placement(np.array(rows), np.full(2, slots), np.zeros(2, int), np.full(len(rows), 4), np.array([1, 2]), 3)


def small(**changes: object) -> Placement:
    """One layer, three slots on each of two ranks, three experts and no empty slot unless changed."""
    fields = {
        "slot_to_expert": np.array([[0, 1, 2, 0, 1, 2]]),
        "slots_of_rank": np.full(2, 3),
        "node_of_rank": np.zeros(2, int),
        "experts_per_layer": np.array([3]),
    }
    return Placement(**{**fields, **changes})


def exported(path: Path, engine: str, placement: Placement | None = None) -> Path:
    """The exported file of the toy, in a form that the engine can express."""
    file = path / f"placement{SUFFIX[engine]}"
    write_engine_placement(file, placement or (toy(TRACE_ROWS) if engine == "exflow" else toy()), engine)
    return file


def test_sglang_content(tmp_path: Path) -> None:
    """One key, a row per decoder layer, the dense one trivial."""
    file = exported(tmp_path, "sglang")
    assert json.loads(file.read_text()) == {"physical_to_logical_map": [[0, 1, 2, 3, 0, 1], *ROWS]}


def test_vllm_content(tmp_path: Path) -> None:
    """The record of one pull request, the list of the other."""
    file = exported(tmp_path, "vllm")
    assert json.loads(file.read_text()) == {
        "record_type": "eplb_initial_mapping",
        "version": 1,
        "num_redundant_experts": 2,
        "num_slots": 6,
        "initial_global_assignments": {"0": ROWS[0], "1": ROWS[1]},
    }
    assert file.read_text().count("\n") == 1
    assert json.loads(file.with_name("placement.jsonl.list.json").read_text()) == ROWS


def test_trtllm_content(tmp_path: Path) -> None:
    """Three keys; layers by decoder index."""
    assert exported(tmp_path, "trtllm").read_text() == (
        "num_slots: 6\ninitial_global_assignments:\n  1: [0, 3, 1, 2, 1, 0]\n  2: [1, 2, 0, 3, 0, 2]\n"
        "layer_updates_per_iter: 0\n"
    )


def test_vllm_ascend_content(tmp_path: Path) -> None:
    """Layers and devices in order, numbered by position."""
    assert json.loads(exported(tmp_path, "vllm-ascend").read_text()) == {
        "moe_layer_count": 2,
        "layer_list": [
            {
                "layer_id": layer,
                "device_count": 2,
                "device_list": [
                    {"device_id": 0, "device_expert": row[:3]},
                    {"device_id": 1, "device_expert": row[3:]},
                ],
            }
            for layer, row in enumerate(ROWS)
        ],
    }


def test_omni_content(tmp_path: Path) -> None:
    """(R, L, E) int32 zeros and ones; slots come back by rising expert id."""
    file = exported(tmp_path, "omni")
    pattern_RLE = np.load(file)
    assert pattern_RLE.dtype == np.int32
    assert pattern_RLE.tolist() == [[[1, 1, 0, 1], [1, 1, 1, 0]], [[1, 1, 1, 0], [1, 0, 1, 1]]]
    assert read_engine_placement(file, "omni").slot_to_expert.tolist() == SORTED_ROWS


def test_exflow_content(tmp_path: Path) -> None:
    """One line per layer * E + e, CRLF."""
    file = exported(tmp_path, "exflow")
    assert file.read_bytes() == b"Expert,Node\r\n0,0\r\n1,1\r\n2,0\r\n3,1\r\n4,0\r\n5,1\r\n6,0\r\n7,1\r\n"


@pytest.mark.parametrize(
    ("engine", "start"),
    [
        ("sglang", "--tp-size 2 --ep-size 2 --nnodes 1 --ep-num-redundant-experts 2 --init-expert-location {}"),
        ("vllm", '{{"num_redundant_experts": 2, "initial_mapping_path": "{}"}}'),
        ("trtllm", "moe_config: {{load_balancer: {}}}"),
        (
            "vllm-ascend",
            '--additional-config \'{{"eplb_config": {{"expert_map_path": "{}", "num_redundant_experts": 2}}}}\'',
        ),
        ("omni", "pattern_path: {}, max_moe_layer_num: 2, max_redundant_per_expert: 2, max_redundant_per_rank: 1"),
        ("exflow", "solution_intra2_inter1_cost"),
    ],
)
def test_start_names_file_and_redundancy(tmp_path: Path, engine: str, start: str) -> None:
    """The flags to start the engine with; the sidecar keeps them with the digest and the evidence."""
    placement = toy(TRACE_ROWS) if engine == "exflow" else toy()
    file = tmp_path / f"p{SUFFIX[engine]}"
    export = write_engine_placement(file, placement, engine, provenance={"evidence": {"split": "test"}})
    assert start.format(file) in export.start
    assert export.notes
    sidecar = json.loads(sidecar_path(file).read_text())
    assert (sidecar["start"], sidecar["digest"]) == (export.start, placement.digest)
    assert sidecar["evidence"] == {"split": "test"}


@pytest.mark.parametrize("engine", ENGINES)
@given(data=st.data())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trips(tmp_path: Path, engine: str, data: st.DataObject) -> None:
    """With the sidecar everything comes back; without it what the file says, once the rest is given."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    ranks, slots, layers = (data.draw(st.integers(1, 4)) for _ in range(3))
    most = ranks * slots
    experts = most if engine == "exflow" else data.draw(st.integers(slots, most))
    placement = random_placement(
        rng,
        layers=layers,
        experts=experts,
        slots_of_rank=[slots] * ranks,
        node_of_rank=[0] * (ranks - 1) + [int(ranks > 1)],
    ).replace(layer_ids=2 * np.arange(layers) + 1, num_hidden_layers=2 * layers + 2)
    file = tmp_path / f"p{SUFFIX[engine]}"
    write_engine_placement(file, placement, engine)
    again = read_engine_placement(file, engine)
    unordered = engine in ("omni", "exflow")
    wanted = _by_rising_expert(placement) if unordered else placement
    assert again.equals(wanted)
    sidecar_path(file).unlink()
    bare = read_engine_placement(
        file, engine, num_ranks=ranks, num_experts=experts, layer_ids=tuple(placement.layer_ids.tolist())
    )
    assert np.array_equal(bare.slot_to_expert, wanted.slot_to_expert)


def _by_rising_expert(placement: Placement) -> Placement:
    shape = (placement.num_layers, placement.num_ranks, -1)
    return placement.replace(
        slot_to_expert=np.sort(placement.slot_to_expert.reshape(shape), axis=2).reshape(placement.num_layers, -1)
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (
            Placement(np.array([[0, 1, 2, 0, 1]]), np.array([3, 2]), np.zeros(2, int), np.array([3])),
            "equal slots on every rank, but in MoE layer 0 .* rank 1 has 2 and rank 0 has 3: .* --slots-per-rank 3 ",
        ),
        (
            Placement(np.array([[0, 1], [0, 0]]), np.full(2, 1), np.zeros(2, int), np.array([2, 1])),
            "MoE layer 1 has 1 and MoE layer 0 has 2",
        ),
        (
            Placement(np.array([[0, 1, 2, 0], [2, 1, 0, -1]]), np.full(2, 2), np.zeros(2, int), np.full(2, 3)),
            "MoE layer 1",
        ),
    ],
)
def test_what_no_format_can_say(tmp_path: Path, engine: str, placement: Placement, message: str) -> None:
    """Unequal slots, unequal layers and uneven empty slots are refused by layer; nothing is written."""
    file = tmp_path / f"p{SUFFIX[engine]}"
    with pytest.raises(InputError, match=message):
        write_engine_placement(file, placement, engine)
    assert not list(tmp_path.iterdir())


def test_what_one_format_cannot_say(tmp_path: Path) -> None:
    """Replicas for ExFlow, wrong endings, slots empty everywhere for Omni; empty slots of one layer are fine there."""
    with pytest.raises(InputError, match="expert 0 of MoE layer 0 has 2 slots"):
        write_engine_placement(tmp_path / "p.csv", toy(), "exflow")
    for engine, ending in (("sglang", "json"), ("vllm-ascend", "json"), ("omni", "npy")):
        with pytest.raises(InputError, match=rf"must end in \.{ending}"):
            write_engine_placement(tmp_path / "p.txt", toy(), engine)
    sparse = toy([[0, 3, 1, 2, 1, 0], [1, 2, -1, 3, -1, 0]])
    file = tmp_path / "p.npy"
    write_engine_placement(file, sparse, "omni")
    assert read_engine_placement(file, "omni").slot_to_expert.tolist() == [SORTED_ROWS[0], [1, 2, -1, 0, 3, -1]]
    with pytest.raises(InputError, match="empty in every layer: MoE layer 0"):
        write_engine_placement(file, toy([[0, 3, -1, 2, 1, -1], [1, 2, -1, 3, -1, 0]]), "omni")
    with pytest.raises(InputError, match="engine 'x' must be one of sglang"):
        write_engine_placement(file, toy(), "x")


def test_the_sidecar_and_the_caller(tmp_path: Path) -> None:
    """A changed file is told; a caller who contradicts the file is told; missing facts are asked for."""
    file = exported(tmp_path, "trtllm")
    file.write_text(file.read_text().replace("[0, 3, 1, 2, 1, 0]", "[3, 0, 1, 2, 1, 0]"))
    with pytest.warns(MoeplaceWarning, match="changed after it was exported"):
        read_engine_placement(file, "trtllm")
    with pytest.raises(InputError, match=r"says layer_ids \(1, 2\), but \(0, 1\) was given"):
        read_engine_placement(file, "trtllm", layer_ids=(0, 1))
    sidecar_path(file).write_text("{}")
    with pytest.raises(FormatError, match="not a sidecar"):
        read_engine_placement(file, "trtllm")
    sidecar_path(file).unlink()
    with pytest.raises(InputError, match="give the number of ranks"):
        read_engine_placement(file, "trtllm")
    with pytest.raises(FormatError, match="6 slots per layer, not a multiple of 4 ranks"):
        read_engine_placement(file, "trtllm", num_ranks=4)
    sglang = exported(tmp_path, "sglang")
    sidecar_path(sglang).unlink()
    with pytest.warns(MoeplaceWarning, match="all 3 rows are taken for MoE layers"):
        assert read_engine_placement(sglang, "sglang", num_ranks=2).num_layers == 3
    csv = exported(tmp_path, "exflow")
    sidecar_path(csv).unlink()
    with pytest.raises(InputError, match="give the number of experts per layer"):
        read_engine_placement(csv, "exflow")
    assert read_engine_placement(csv, "exflow", num_experts=4).slot_to_expert.tolist() == TRACE_ROWS


def edit_json(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return edit


def edit_yaml(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        document = yaml.safe_load(path.read_text())
        change(document)
        path.write_text(yaml.safe_dump(document))

    return edit


def edit_text(old: str, new: str) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))


def edit_pattern(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda path: np.save(path, change(np.load(path)))


MAP = "physical_to_logical_map"
DAMAGES = [
    ("sglang", edit_json(lambda d: d.update(logical_count=[])), "the key 'logical_count'"),
    ("sglang", edit_json(lambda d: d.update({"logical_count": d.pop(MAP)})), r"loads \(logical_count\)"),
    ("sglang", edit_json(lambda d: d.pop(MAP)), "lacks the key"),
    ("sglang", edit_json(lambda d: d[MAP].pop()), "decoder layer 2 is not among them"),
    ("sglang", edit_json(lambda d: d[MAP][1].pop()), "layer 1 has 6 slots, layer 0 has 5"),
    ("sglang", edit_json(lambda d: d[MAP][1].__setitem__(0, "x")), "layer 0 holds 'x'"),
    ("sglang", edit_json(lambda d: d[MAP][1].__setitem__(0, 1.5)), "layer 0 holds 1.5"),
    ("sglang", edit_json(lambda d: d[MAP][1].__setitem__(0, 4)), "holds expert 4"),
    ("sglang", edit_json(lambda d: d[MAP][1].__setitem__(1, 2)), "expert 3 of MoE layer 0 has no slot"),
    ("sglang", edit_json(lambda d: d.update({MAP: [1, 2, 3]})), "no rows of expert ids"),
    ("sglang", edit_json(lambda d: d.update({MAP: 1})), "must be a list of rows"),
    ("vllm", edit_text("eplb_initial_mapping", "other"), "0 records"),
    ("vllm", edit_text('"num_slots": 6', '"num_slots": 7'), r"must list num_slots \(7\) experts"),
    ("vllm", edit_text('"1": [', '"2": ['), "numbered '0'..'1'"),
    ("vllm", edit_text('"num_redundant_experts": 2', '"num_redundant_experts": 1'), "says num_experts 5, but 4"),
    ("vllm", edit_text("{", ""), "not a vLLM placement"),
    ("trtllm", edit_yaml(lambda d: d.update(ep_size=2)), "the key 'ep_size'"),
    ("trtllm", edit_yaml(lambda d: d.update(num_slots=7)), r"must list num_slots \(7\)"),
    ("trtllm", edit_yaml(lambda d: d["initial_global_assignments"].update(x=[])), "layer 'x' must be"),
    ("trtllm", edit_text("initial_global", "other"), "lacks initial_global_assignments"),
    ("trtllm", edit_text("[0", "["), "not YAML|must list|holds"),
    ("trtllm", edit_text("num_slots: 6", "a: !!python/object/apply:os.getcwd []"), "not YAML"),
    ("vllm-ascend", edit_json(lambda d: d.update(moe_layer_count=3)), "as many layers"),
    ("vllm-ascend", edit_json(lambda d: d["layer_list"][1].pop("device_list")), "layer 1 lacks a list device_list"),
    (
        "vllm-ascend",
        edit_json(lambda d: d["layer_list"][1]["device_list"][0]["device_expert"].pop()),
        "layer 1 must have equally many",
    ),
    ("omni", edit_pattern(lambda a: a[0]), "array .ranks, MoE layers, experts."),
    ("omni", edit_pattern(lambda a: a * 2), "integers 0 and 1"),
    ("omni", edit_pattern(lambda a: a.astype(float)), "integers 0 and 1"),
    ("omni", edit_pattern(lambda a: np.concatenate([a[:1], 1 - a[1:]])), r"MoE layer 0 they hold \[3, 1\]"),
    ("omni", edit_text("NUMPY", "BUMPY"), "not a readable .npy file"),
    ("exflow", edit_text("Expert,", "Ex,"), "must have the columns Expert,Node"),
    ("exflow", edit_text("7,1", "6,1"), "exactly once"),
    ("exflow", edit_text("7,1", "7,0"), "MoE layer 1 does not put 4 experts evenly on 2 ranks"),
    ("exflow", edit_text("7,1", "7,x"), "not an ExFlow solution"),
    ("exflow", edit_text("7,1", "7,1,1"), "not an ExFlow solution"),
]


@pytest.mark.parametrize(("engine", "damage", "message"), DAMAGES)
def test_damaged_files_are_named(tmp_path: Path, engine: str, damage: Callable[[Path], None], message: str) -> None:
    """Each damage is answered with one sentence that says what is wrong."""
    file = exported(tmp_path, engine)
    damage(file)
    with pytest.raises(InputError, match=message) as caught:
        read_engine_placement(file, engine)
    assert str(file) in str(caught.value)


def test_positions_win_over_numbers(tmp_path: Path) -> None:
    """vllm-ascend reads layers by position; so do we, with a warning."""
    file = exported(tmp_path, "vllm-ascend")
    edit_json(lambda d: d["layer_list"].reverse())(file)
    with pytest.warns(MoeplaceWarning, match="reads positions"):
        placement = read_engine_placement(file, "vllm-ascend", num_ranks=2)
    assert placement.slot_to_expert.tolist() == ROWS[::-1]


def test_sglang_archives(tmp_path: Path) -> None:
    """A `.pt` with a tensor or with lists is read without torch; other shapes and types are refused."""
    torch = pytest.importorskip("torch")
    file, rows = tmp_path / "p.pt", [[0, 1, 2, 3, 0, 1], *ROWS]
    for value in (torch.tensor(rows), torch.tensor(rows, dtype=torch.int32), rows):
        torch.save({"physical_to_logical_map": value}, file)
        placement = read_engine_placement(file, "sglang", num_ranks=2, layer_ids=(1, 2))
        assert placement.equals(toy())
    torch.save({"physical_to_logical_map": torch.tensor(rows, dtype=torch.float32)}, file)
    with pytest.raises(FormatError, match=r"must be integers \(layers, slots\), not float32"):
        read_engine_placement(file, "sglang", num_ranks=2, layer_ids=(1, 2))


def test_vllm_lists(tmp_path: Path) -> None:
    """The list of lists, and one list for all layers; other records beside the mapping are passed over."""
    file = tmp_path / "m.json"
    file.write_text(json.dumps(ROWS))
    assert read_engine_placement(file, "vllm", num_ranks=2).slot_to_expert.tolist() == ROWS
    file.write_text(json.dumps(ROWS[0]))
    with pytest.raises(FormatError, match="one list for all layers"):
        read_engine_placement(file, "vllm", num_ranks=2)
    both = read_engine_placement(file, "vllm", num_ranks=2, layer_ids=(1, 2))
    assert both.slot_to_expert.tolist() == [ROWS[0], ROWS[0]]
    mapping = exported(tmp_path, "vllm")
    mapping.write_text('{"record_type": "eplb_load_meta", "version": 1}\n' + mapping.read_text())
    assert read_engine_placement(mapping, "vllm").slot_to_expert.tolist() == ROWS


@pytest.mark.parametrize("engine", ENGINES)
@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_files_give_a_placement_or_one_sentence(tmp_path: Path, engine: str, data: st.DataObject) -> None:
    """Random bytes changed, cut or doubled: no other exception than ours."""
    folder = tmp_path / engine
    folder.mkdir(exist_ok=True)
    file = exported(folder, engine)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        size = data.draw(st.integers(0, 9))
        content[at : at + size] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"9" * 30, b"[", b"{", b"-", b"1e9"])
        )
        content = content or bytearray(b" ")
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MoeplaceWarning)
        try:
            read_engine_placement(file, engine)
        except MoeplaceError:
            return
