"""Quantised forms: what is read is what an independent packer meant, bit by bit, and what `transformers` reads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moeplace.profiling.errors import FormatError
from moeplace.profiling.recording.quantised.forms import Fp4, Scaled
from moeplace.profiling.recording.quantised.quantisation import NotReadableError, Quantisation
from moeplace.profiling.recording.stored_tensors import StoredTensors
from tests.packers import BLOCK, FORMS, GROUP, fp4, fp8, mxfp4


class Config:
    """A configuration that says something of quantisation."""

    def __init__(self, stated: Any) -> None:
        self.quantization_config = stated


def store(folder: Path, matrix: np.ndarray, form: str, seed: int) -> tuple[StoredTensors, np.ndarray]:
    """A file with one linear layer `a.b.proj` in a form, and what it means."""
    packer, stated = FORMS[form]
    tensors, meaning = packer(matrix, np.random.default_rng(seed))
    stem = "a.b.proj.weight" if all(not e or e.startswith("_") for e in tensors) else "a.b.proj."
    named = {f"{stem}{ending}": value.contiguous() for ending, value in tensors.items()}
    save_file({**named, "a.norm.weight": torch.ones(3)}, folder / "model.safetensors")
    return StoredTensors(folder, Quantisation.of(Config(stated))), meaning


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(64, 96), (32, 32), (8, 160)])
def test_matrices_are_what_they_mean(tmp_path: Path, form: str, shape: tuple[int, int], dated_seed: int) -> None:
    """Every form, several shapes, fixed and new numbers: equal in every bit; other tensors stay as they are."""
    for seed in (0, dated_seed):
        size = (3, *shape[::-1]) if form == "mxfp4" else shape
        matrix = np.random.default_rng(seed).normal(0, 0.2, size)
        stored, meaning = store(tmp_path, matrix, form, seed)
        assert stored.names == {"a.b.proj.weight", "a.norm.weight"}
        found = stored.slice_of("a.b.proj.weight")
        assert list(found.get_shape()) == list(meaning.shape) == stored.shape_of("a.b.proj.weight")
        np.testing.assert_array_equal(found[...].double().numpy(), meaning)
        assert np.abs(meaning).max() > 0.1
        assert stored.slice_of("a.norm.weight")[...].tolist() == [1, 1, 1]
        if form == "mxfp4":
            np.testing.assert_array_equal(found[1].double().numpy(), meaning[1])
            np.testing.assert_array_equal(found[1:3].double().numpy(), meaning[1:3])


@pytest.mark.parametrize("shape", [(40, 24), (BLOCK, BLOCK), (1, 7), (33, 65), (3, 40, 24)])
def test_blocks_may_be_cut(tmp_path: Path, shape: tuple[int, ...], dated_seed: int) -> None:
    """The last block of fp8 scales covers what is left, as DeepSeek-V3's 576 rows by blocks of 128 need it."""
    matrix = np.random.default_rng(dated_seed).normal(0, 0.2, shape)
    stored, meaning = store(tmp_path, matrix, "fp8", dated_seed)
    np.testing.assert_array_equal(stored.slice_of("a.b.proj.weight")[...].double().numpy(), meaning)


def test_scales_of_the_whole_of_rows_and_of_experts() -> None:
    """A scale for everything, one per row without a second dimension, one per expert."""
    weight = torch.arange(-12, 12).reshape(2, 3, 4).to(torch.float8_e4m3fn)
    for scale, spread in (
        (torch.tensor(2.0), torch.tensor(2.0)),
        (torch.tensor([2.0]), torch.tensor(2.0)),
        (torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.tensor([[1.0, 2, 3], [4, 5, 6]])[:, :, None]),
        (torch.tensor([[[2.0]], [[3.0]]]), torch.tensor([2.0, 3.0])[:, None, None]),
    ):
        assert torch.equal(Scaled().unpack({"weight": weight, "scale": scale}), weight.float() * spread)
    zero = torch.tensor([[1], [2], [3]], dtype=torch.int8)
    codes, scale = torch.arange(12, dtype=torch.int8).reshape(3, 4), torch.tensor([[0.1], [0.2], [0.3]]).half()
    expected = ((codes.float() - zero.float()) * scale.float()).half()
    found = Scaled().unpack({"weight": codes, "scale": scale, "zero_point": zero})
    assert found.dtype == torch.float16
    assert torch.equal(found, expected)


def test_numbers_are_those_of_transformers(dated_seed: int) -> None:
    """Its own operations for fp8 blocks, DeepSeek-V4's 4-bit experts and gpt-oss, where they need no GPU."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(dated_seed)
    plain = Fp8Dequantize(None)
    for packer, form in ((fp8, Scaled((BLOCK, BLOCK))), (fp4, Fp4())):
        tensors, _ = packer(rng.normal(0, 0.2, (64, 96)), rng)
        theirs = plain._dequantize_one(tensors[""], tensors["_scale_inv"], torch.float32)
        assert torch.equal(form.unpack({"weight": tensors[""], "scale": tensors["_scale_inv"]}), theirs)
    tensors, _ = mxfp4(rng.normal(0, 0.2, (2, 64, 96)), rng)
    theirs = convert_moe_packed_tensors(tensors["_blocks"], tensors["_scales"], dtype=torch.float32)
    ours = Fp4(is_transposed=True).unpack({"weight": tensors["_blocks"], "scale": tensors["_scales"]})
    assert torch.equal(ours.transpose(1, 2), theirs)


def test_scales_of_activations_are_left_out(tmp_path: Path) -> None:
    """What static schemes store of activations is no parameter; names that published checkpoints use for scales."""
    codes = torch.ones(4, 4).to(torch.float8_e4m3fn)
    tensors = {
        "a.weight": codes, "a.weight_scale_inv": torch.tensor([[2.0]]), "a.activation_scale": torch.ones(1),
        "b.weight": codes.clone(), "b.scale": torch.tensor([[3.0]]),
        "c.weight": codes.clone(), "c.qscale_weight": torch.tensor(4.0), "c.qscale_act": torch.ones(1),
        "d.weight": torch.ones(4, 4), "d.scale": torch.ones(4),
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    stored = StoredTensors(tmp_path, Quantisation("fp8"))
    assert stored.names == {"a.weight", "b.weight", "c.weight", "d.weight", "d.scale"}
    values = {name: float(stored.slice_of(name)[...].reshape(-1)[0]) for name in stored.names}
    assert values == {"a.weight": 2, "b.weight": 3, "c.weight": 4, "d.weight": 1, "d.scale": 1}
    assert stored.bytes_of("a.weight") == 16 + 4
    assert stored.bytes_of("d.weight") == 64


_GROUPS = {"g": {"weights": {"num_bits": 4, "type": "int"}}}


@pytest.mark.parametrize(
    ("stated", "sentence"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"bits": 4}, "no quant_method"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq of 4 bits in the version gemv"),
        ({"quant_method": "awq", "bits": 8, "version": "gemm"}, "awq of 8 bits in the version gemm"),
        ({"quant_method": "gptq", "bits": 3}, "gptq of 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "gptq in the format marlin"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "tensors, nvfp4-pack-quantized"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "transform_config": {"a": 1}},
         "compressed-tensors, transform_config"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized",
          "sparsity_config": {"format": "sparse-24-bitmask"}}, "compressed-tensors, sparsity_config"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized",
          "config_groups": {"g": {"weights": {"num_bits": 3, "type": "int"}}}}, "compressed-tensors of 3 bits"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized",
          "config_groups": {**_GROUPS, "h": {"weights": {"num_bits": 8, "type": "int"}}}}, "of 4 and 8 bits"),
    ],
)  # fmt: skip
def test_other_forms_are_named(stated: dict[str, Any], sentence: str) -> None:
    """A method, a version, a format, a width or an addition that is not read."""
    with pytest.raises(NotReadableError, match=sentence):
        Quantisation.of(Config(stated))


def test_what_is_stated_is_read() -> None:
    """Nothing, fp8 blocks, both formats of GPTQ, mixed groups of fp8 and int4, a sparsity that is none."""
    assert Quantisation.of(Config(None)) == Quantisation()
    stated = {"quant_method": "fp8", "weight_block_size": [128, 64]}
    assert Quantisation.of(Config(stated)) == Quantisation("fp8", block=(128, 64))
    for name, offset in (("gptq", 1), ("gptq_v2", 0)):
        stated = {"quant_method": "gptq", "bits": 8, "checkpoint_format": name}
        assert Quantisation.of(Config(stated)) == Quantisation("gptq", bits=8, zero_offset=offset)
    groups = {**_GROUPS, "h": {"weights": {"num_bits": 8, "type": "float"}, "format": "float-quantized"}}
    stated = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups,
              "sparsity_config": {"format": "dense", "sparsity": 0.1}}  # fmt: skip
    assert Quantisation.of(Config(stated)) == Quantisation("compressed-tensors", bits=4)


def read(stored: StoredTensors) -> tuple[str | None, list[int]]:
    """The sentence with which a matrix is refused, or its shape."""
    try:
        return None, list(stored.slice_of("a.b.proj.weight")[...].shape)
    except FormatError as error:
        return str(error), []


@pytest.mark.parametrize("form", FORMS)
def test_tensors_that_do_not_fit_are_one_sentence(tmp_path: Path, form: str, dated_seed: int) -> None:
    """A part that is cut, or missing: refused with the name of the matrix, never another exception."""
    from safetensors.torch import load_file

    size = (3, 64, 64) if form == "mxfp4" else (64, 64)
    stored, _ = store(tmp_path, np.random.default_rng(0).normal(0, 0.2, size), form, 0)
    tensors = load_file(tmp_path / "model.safetensors")
    rng = np.random.default_rng(dated_seed)
    for name in [name for name in tensors if name != "a.norm.weight" and "shape" not in name]:
        for axis in range(tensors[name].ndim):
            length = tensors[name].shape[axis]
            for kept in {int(rng.integers(1, length)) if length > 1 else 1, max(length - 1, 1)} - {length}:
                changed = {**tensors, name: tensors[name].narrow(axis, 0, kept).contiguous()}
                save_file(changed, tmp_path / "model.safetensors")
                damaged = StoredTensors(tmp_path, stored.quantisation)
                refusal, shape = read(damaged)
                if refusal is None:  # another matrix that is as well: its shape shows it
                    assert shape == damaged.shape_of("a.b.proj.weight")
                else:
                    assert "a.b.proj.weight" in refusal
                    assert "\n" not in refusal


@pytest.mark.parametrize("part", ["blocks", "scales"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_of_several_does_not_stand_for_all(tmp_path: Path, part: str, axis: int) -> None:
    """One matrix, row or block among tensors of several: it is not repeated for the others."""
    from safetensors.torch import load_file

    stored, _ = store(tmp_path, np.random.default_rng(0).normal(0, 0.2, (3, 64, 64)), "mxfp4", 0)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith(part))
    save_file({**tensors, name: tensors[name].narrow(axis, 0, 1).contiguous()}, tmp_path / "model.safetensors")
    refusal, _ = read(StoredTensors(tmp_path, stored.quantisation))
    assert refusal is not None
    assert "a.b.proj.weight" in refusal


def test_groups_and_blocks_are_no_powers_of_the_sizes() -> None:
    """The packers' groups are smaller than the matrices that the other tests pack, or these would show nothing."""
    assert GROUP < 32
    assert BLOCK < 32
