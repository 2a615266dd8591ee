"""Writes quantised checkpoints, number by number in numpy, and the plain ones that they stand for.

A packer draws codes, scales and zeros at random about a matrix and says what they mean; it shares no code with what
reads them. `quantise_checkpoint` writes a folder in a form, and beside it the same model in plain tensors: the oracle.

Layouts: DeepSeek-V3's fp8 blocks, gpt-oss' MXFP4, AutoAWQ's GEMM version, AutoGPTQ's first and second format, with and
without act-order, and compressed-tensors' packed int4 and fp8 by row.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

BLOCK, GROUP = 16, 16
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Column of each field of a word, the lowest bits first, as AutoAWQ packs."""
Packed = tuple[dict[str, torch.Tensor], np.ndarray]
"""Tensors by the end of their names, and the float64 matrix that they mean."""
Packer = Callable[[np.ndarray, np.random.Generator], Packed]


class NotPackableError(Exception):
    """A matrix has sizes that the form cannot have."""


def fp8(matrix: np.ndarray, rng: np.random.Generator) -> Packed:
    """float8_e4m3fn (..., out, in) and float32 `weight_scale_inv` per block, the last blocks cut."""
    *lead, rows, columns = matrix.shape
    grid = [-(-rows // BLOCK), -(-columns // BLOCK)]
    scale = rng.uniform(0.5, 1.5, (*lead, *grid)).astype(np.float32) / 64
    spread = np.repeat(np.repeat(scale, BLOCK, -2)[..., :rows, :], BLOCK, -1)[..., :columns]
    codes = torch.from_numpy(np.clip(matrix / spread, -440, 440)).to(torch.float8_e4m3fn)
    meaning = codes.float().numpy() * spread
    return {"": codes, "_scale_inv": torch.from_numpy(scale)}, meaning.astype(np.float64)


def fp8_rows(matrix: np.ndarray, rng: np.random.Generator) -> Packed:
    """compressed-tensors' float-quantized: a scale per row, in bfloat16."""
    scale = torch.from_numpy(rng.uniform(0.5, 1.5, (*matrix.shape[:-1], 1)) / 64).bfloat16()
    codes = torch.from_numpy(np.clip(matrix / scale.double().numpy(), -440, 440)).to(torch.float8_e4m3fn)
    return {"": codes, "_scale": scale}, codes.double().numpy() * scale.double().numpy()


def fp4(matrix: np.ndarray, rng: np.random.Generator) -> Packed:
    """DeepSeek-V4's experts: two 4-bit floats in an int8, the first column in the lower half; scales are exponents."""
    codes, exponents, meaning = _fp4(matrix, rng)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8).view(np.int8)
    return {"": torch.from_numpy(packed), "_scale_inv": torch.from_numpy(exponents).view(torch.float8_e8m0fnu)}, meaning


def mxfp4(matrix: np.ndarray, rng: np.random.Generator) -> Packed:
    """gpt-oss: `_blocks` (E, out, in / 32, 16), `_scales` (E, out, in / 32), for a plain tensor (E, in, out)."""
    codes, exponents, meaning = _fp4(matrix.swapaxes(-2, -1), rng)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
    blocks = blocks.reshape(*blocks.shape[:-1], -1, 16)
    return {"_blocks": torch.from_numpy(blocks), "_scales": torch.from_numpy(exponents)}, meaning.swapaxes(-2, -1)


def _fp4(matrix: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if matrix.shape[-1] % 32:
        raise NotPackableError(f"{matrix.shape[-1]} columns are no multiple of 32")
    exponents = rng.integers(122, 126, (*matrix.shape[:-1], matrix.shape[-1] // 32)).astype(np.uint8)
    spread = np.repeat(2.0 ** (exponents.astype(int) - 127), 32, -1)
    codes = np.abs(E2M1 - (matrix / spread)[..., None]).argmin(-1)
    return codes, exponents, E2M1[codes] * spread


def awq(matrix: np.ndarray, rng: np.random.Generator) -> Packed:
    """AutoAWQ, GEMM: everything is (in, out); eight columns per word in an order of their own."""
    codes, zeros, scale, meaning = _grouped(matrix, rng, np.float16)
    return {
        "qweight": torch.from_numpy(_awq_words(codes.T)),
        "qzeros": torch.from_numpy(_awq_words(zeros)),
        "scales": torch.from_numpy(scale),
    }, meaning


def _awq_words(codes: np.ndarray) -> np.ndarray:
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for place, column in enumerate(AWQ_ORDER):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


def gptq(matrix: np.ndarray, rng: np.random.Generator, *, offset: int = 1, act_order: bool = True) -> Packed:
    """AutoGPTQ: words run along in, those of zeros along out; columns may belong to any group."""
    group = np.arange(matrix.shape[1]) // GROUP
    if act_order:
        group = rng.permutation(group)
    codes, zeros, scale, meaning = _grouped(matrix, rng, np.float16, group=group, least_zero=offset)
    return {
        "qweight": torch.from_numpy(_words(codes).T.copy()),
        "qzeros": torch.from_numpy(_words(zeros - offset)),
        "scales": torch.from_numpy(scale),
        "g_idx": torch.from_numpy(group.astype(np.int32)),
    }, meaning


def gptq_v2(matrix: np.ndarray, rng: np.random.Generator) -> Packed:
    """The second format: zeros as they are; groups in order."""
    return gptq(matrix, rng, offset=0, act_order=False)


def packed_int4(matrix: np.ndarray, rng: np.random.Generator) -> Packed:
    """compressed-tensors' pack-quantized, not symmetric: words along in, those of zeros along out."""
    codes, zeros, scale, meaning = _grouped(matrix, rng, np.float16)
    return {
        "weight_packed": torch.from_numpy(_words(codes)),
        "weight_scale": torch.from_numpy(np.ascontiguousarray(scale.T)),
        "weight_zero_point": torch.from_numpy(np.ascontiguousarray(_words(zeros).T)),
        "weight_shape": torch.tensor(matrix.shape),
    }, meaning


def ordered_int4(matrix: np.ndarray, rng: np.random.Generator) -> Packed:
    """The same with columns of any group, as activation ordering leaves them."""
    group = rng.permutation(np.arange(matrix.shape[1]) // GROUP)
    codes, zeros, scale, meaning = _grouped(matrix, rng, np.float16, group=group)
    return {
        "weight_packed": torch.from_numpy(_words(codes)),
        "weight_scale": torch.from_numpy(np.ascontiguousarray(scale.T)),
        "weight_zero_point": torch.from_numpy(np.ascontiguousarray(_words(zeros).T)),
        "weight_g_idx": torch.from_numpy(group.astype(np.int32)),
        "weight_shape": torch.tensor(matrix.shape),
    }, meaning


def packed_mxfp4(matrix: np.ndarray, rng: np.random.Generator) -> Packed:
    """compressed-tensors' mxfp4-pack-quantized: bytes of two 4-bit floats, scales are exponents."""
    codes, exponents, meaning = _fp4(matrix, rng)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
    return {"weight_packed": torch.from_numpy(packed), "weight_scale": torch.from_numpy(exponents)}, meaning


def symmetric_int4(matrix: np.ndarray, rng: np.random.Generator) -> Packed:
    """The same without zeros."""
    codes, _, scale, meaning = _grouped(matrix, rng, np.float16, zero=8)
    return {
        "weight_packed": torch.from_numpy(_words(codes)),
        "weight_scale": torch.from_numpy(np.ascontiguousarray(scale.T)),
        "weight_shape": torch.tensor(matrix.shape),
    }, meaning


def _grouped(
    matrix: np.ndarray,
    rng: np.random.Generator,
    dtype: Any,
    *,
    group: np.ndarray | None = None,
    zero: int | None = None,
    least_zero: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes (out, in), zeros and scales (groups, out), meaning (out, in): rounded as a product of `dtype` is."""
    rows, columns = matrix.shape
    if rows % 8 or columns % GROUP:
        raise NotPackableError(f"{rows} x {columns} are no multiples of 8 x {GROUP}")
    group = np.arange(columns) // GROUP if group is None else group
    scale = (rng.uniform(0.02, 0.05, (columns // GROUP, rows))).astype(dtype)
    zeros = rng.integers(max(6, least_zero), 10, scale.shape) if zero is None else np.full(scale.shape, zero)
    spread = scale[group].T.astype(np.float64)
    codes = np.clip(np.rint(matrix / spread) + zeros[group].T, 0, 15).astype(np.int64)
    meaning = ((codes - zeros[group].T) * spread).astype(dtype).astype(np.float64)
    return codes, zeros, scale, meaning


def _words(codes: np.ndarray) -> np.ndarray:
    """(n, m) codes of four bits -> (n, m / 8) words, the first in the lowest bits."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for place in range(8):
        words |= codes[:, place::8].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


_FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
_COMPRESSED = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}
_INT4 = {"num_bits": 4, "type": "int", "group_size": GROUP, "strategy": "group", "symmetric": False}
_SYMMETRIC = {**_INT4, "symmetric": True}
_FLOAT4 = {"num_bits": 4, "type": "float", "group_size": 32, "strategy": "group", "symmetric": True}
FORMS: dict[str, tuple[Packer, dict[str, Any]]] = {
    "fp8": (fp8, _FP8_CONFIG),
    "fp4": (fp4, {**_FP8_CONFIG, "scale_fmt": "ue8m0", "expert_dtype": "fp4"}),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4"}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": False}),
    "gptq-v2": (gptq_v2, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"}),
    "compressed-tensors": (
        packed_int4,
        {**_COMPRESSED, "format": "pack-quantized", "config_groups": {"g": {"targets": ["Linear"], "weights": _INT4}}},
    ),
    "compressed-tensors symmetric": (
        symmetric_int4,
        {
            **_COMPRESSED,
            "format": "pack-quantized",
            "config_groups": {"g": {"targets": ["Linear"], "weights": _SYMMETRIC}},
        },
    ),
    "compressed-tensors in any order": (
        ordered_int4,
        {
            **_COMPRESSED,
            "format": "pack-quantized",
            "config_groups": {"g": {"weights": {**_INT4, "actorder": "group"}}},
        },
    ),
    "compressed-tensors mxfp4": (
        packed_mxfp4,
        {**_COMPRESSED, "format": "mxfp4-pack-quantized", "config_groups": {"g": {"weights": _FLOAT4}}},
    ),
    "compressed-tensors fp8": (
        fp8_rows,
        {
            **_COMPRESSED,
            "format": "float-quantized",
            "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
        },
    ),
}
"""Name -> packer, and what a configuration says of it."""
_LINEAR = re.compile(r"(proj|_[ab]|w1|w2|w3|linear|fc\d)\.weight$")
_GRANITE = re.compile(r"block_sparse_moe\.(in|out)put_linear\.weight$")
_STACKED = re.compile(r"experts\.(gate_up_proj|up_proj|down_proj)$")


def quantise_checkpoint(
    folder: Path, form: str, out: Path, plain: Path, *, seed: int, experts_only: bool = False
) -> int:
    """Write the checkpoint in `folder` to `out` in a form, what that means to `plain`; how many matrices of experts.

    Raises:
        NotPackableError: nothing in it can have this form.
    """
    packer, stated = FORMS[form]
    rng = np.random.default_rng(seed)
    packed: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    experts = 0
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not _is_quantised(name, tensor, form, experts_only=experts_only):
            packed[name] = meant[name] = tensor
            continue
        packs = fp8 if form == "fp4" and "experts." not in name else packer  # as DeepSeek-V4 does
        try:
            tensors, meaning = packs(tensor.double().numpy(), rng)
        except NotPackableError:
            if _is_routed(name):
                raise
            packed[name] = meant[name] = tensor
            continue
        replaces_name = all(not ending or ending.startswith("_") for ending in tensors)
        stem = name if replaces_name else name.removesuffix("weight")
        packed |= {f"{stem}{ending}": value.contiguous() for ending, value in tensors.items()}
        meant[name] = torch.from_numpy(np.ascontiguousarray(meaning))
        experts += _is_routed(name)
    if not experts:
        raise NotPackableError("experts are stored in one tensor a layer, or one each, in which the form is not used")
    config = json.loads((folder / "config.json").read_text())
    for target, tensors, changed in ((out, packed, {**config, "quantization_config": stated}), (plain, meant, config)):
        target.mkdir(parents=True)
        for file in folder.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, target)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps(changed))
    return experts


def _is_routed(name: str) -> bool:
    return bool(_GRANITE.search(name)) or ("experts." in name and "shared" not in name)


def _is_quantised(name: str, tensor: torch.Tensor, form: str, *, experts_only: bool) -> bool:
    """Linear layers, routers and heads not among them; experts stacked in one tensor where the form knows such."""
    if form == "mxfp4":
        return bool(_STACKED.search(name)) and tensor.ndim == 3
    if form == "fp8" and tensor.ndim == 3 and (_STACKED.search(name) or _GRANITE.search(name)):
        return True
    if tensor.ndim != 2 or not _LINEAR.search(name) or (experts_only and "experts." not in name):
        return False
    return not any(part in name for part in ("router", "gate.weight", "lm_head", "embed"))
