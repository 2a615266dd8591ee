"""Quantisation: what a configuration says of how weights are stored, and which tensors on disk make one matrix.

Which matrices are quantised is seen from the names on disk, never from lists of modules in the configuration:

    fp8                  N with N_scale_inv, N_scale, or X.weight with X.scale, X.qscale_weight
    mxfp4                N_blocks with N_scales
    awq, gptq            X.qweight with X.qzeros, X.scales, maybe X.g_idx                    -> X.weight
    compressed-tensors   N with N_scale; X.weight_packed with X.weight_scale, ...            -> X.weight
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moeplace.profiling.recording.quantised.forms import Awq, Fp4, Gptq, PackedInt, Plain, Scaled, StoredForm

METHODS = ("fp8", "mxfp4", "awq", "gptq", "compressed-tensors")
_GPTQ_FORMATS = {"gptq": 1, "gptq_v2": 0}
_COMPRESSED = ("pack-quantized", "float-quantized", "naive-quantized", "int-quantized", "mxfp4-pack-quantized", "dense")
_WIDTHS = (2, 4, 8)
_SCALES = ("_scale_inv", "_scale")
_DROPPED = (
    *("activation_scale", "input_scale", "output_scale", "input_zero_point", "output_zero_point", "qscale_act"),
    "weight_shape",
)
"""Of activations, which are not rounded; and a shape that the other tensors have."""


class NotReadableError(Exception):
    """Weights are quantised in a way that is not read; says which."""


@dataclass(frozen=True)
class StoredMatrix:
    """Tensors on disk that make one matrix.

    Attributes:
        form: how.
        names: part -> name on disk.
    """

    form: StoredForm
    names: Mapping[str, str] = field(hash=False)


@dataclass(frozen=True)
class Quantisation:
    """How a checkpoint's quantised matrices are stored.

    Attributes:
        method: one of `METHODS`, "" = nothing is quantised.
        block: rows and columns of a scale's block, as stated.
        bits: of packed integers.
        zero_offset: see `Gptq`.
    """

    method: str = ""
    block: tuple[int, ...] = ()
    bits: int = 4
    zero_offset: int = 1

    @classmethod
    def of(cls, config: Any) -> "Quantisation":
        """What the configuration of a model says.

        Raises:
            NotReadableError: another method, or a variant of one that is not read.
        """
        stated = stated_quantisation(config)
        if not stated:
            return cls()
        method = str(stated.get("quant_method", "")) or "no quant_method"
        if method not in METHODS:
            raise NotReadableError(method)
        if method == "fp8":
            return cls(method, block=tuple(stated.get("weight_block_size") or ()))
        if method == "compressed-tensors":
            return cls(method, bits=_compressed_bits(stated))
        if method == "mxfp4":
            return cls(method)
        return _packed(cls, method, stated)

    def group(self, names: Iterable[str], dtype_of: Callable[[str], str]) -> dict[str, StoredMatrix]:
        """Plain name -> tensors on disk, for everything in a checkpoint.

        Args:
            names: on disk.
            dtype_of: number type of a tensor as safetensors call it.
        """
        known = set(names)
        found: dict[str, StoredMatrix] = {}
        for name in known if self.method else ():
            grouped = self._read(name, known, dtype_of)
            if grouped is not None:
                found[grouped[0]] = grouped[1]
        used = {name for matrix in found.values() for name in matrix.names.values()}
        if self.method:
            used.update(name for name in known if name.rpartition(".")[2] in _DROPPED)
        return {**{name: StoredMatrix(Plain(), {"weight": name}) for name in known - used}, **found}

    def _read(self, name: str, known: set[str], dtype_of: Callable[[str], str]) -> tuple[str, StoredMatrix] | None:
        """The matrix whose main tensor is `name`, None = it is no main tensor of a quantised one."""
        stem, _, last = name.rpartition(".")
        if last == "qweight" and self.method in ("awq", "gptq"):
            names = _present(known, stem, weight="qweight", zeros="qzeros", scale="scales", g_idx="g_idx")
            form: StoredForm = Awq() if self.method == "awq" else Gptq(self.bits, self.zero_offset)
            return f"{stem}.weight", StoredMatrix(form, names)
        if last == "weight_packed" and self.method == "compressed-tensors":
            names = _present(
                known, stem, weight=last, scale="weight_scale", zeros="weight_zero_point", g_idx="weight_g_idx"
            )
            form = Fp4() if dtype_of(name) == "U8" else PackedInt(self.bits)
            return f"{stem}.weight", StoredMatrix(form, names)
        if name.endswith("_blocks") and self.method == "mxfp4":
            plain = name.removesuffix("_blocks")
            return plain, StoredMatrix(Fp4(is_transposed=True), {"weight": name, "scale": f"{plain}_scales"})
        scale = self._scale_of(name, known)
        if scale is None or not dtype_of(name).startswith(("F8", "I8", "U8")):
            return None
        if self.method == "fp8" and dtype_of(name) in ("I8", "U8"):
            return name, StoredMatrix(Fp4(), {"weight": name, "scale": scale})
        zero = {"zero_point": f"{name}_zero_point"} if f"{name}_zero_point" in known else {}
        return name, StoredMatrix(Scaled(self.block), {"weight": name, "scale": scale, **zero})

    def _scale_of(self, name: str, known: set[str]) -> str | None:
        """The tensor with the scales of an 8-bit one."""
        if self.method not in ("fp8", "compressed-tensors"):
            return None
        stem, _, last = name.rpartition(".")
        candidates = [name + ending for ending in _SCALES]
        if last == "weight":
            candidates += [f"{stem}.scale", f"{stem}.qscale_weight"]
        return next((candidate for candidate in candidates if candidate in known), None)


def not_readable(error: NotReadableError) -> str:
    """What a refusal gives as its reason."""
    return (
        f"its weights are quantised in a form that is not read ({error}): those of {', '.join(METHODS)} are, others "
        "must be converted to plain tensors first"
    )


def stated_quantisation(config: Any) -> Mapping[str, Any]:
    """The part of a configuration that speaks of quantisation, the language model's in one of several; {} = none."""
    parts = [config, config.get_text_config(decoder=True)] if hasattr(config, "get_text_config") else [config]
    for part in parts:
        stated = getattr(part, "quantization_config", None)
        if stated:
            return stated if isinstance(stated, Mapping) else stated.to_dict()
    return {}


def _present(known: set[str], stem: str, **endings: str) -> dict[str, str]:
    """Part -> name of those that exist."""
    return {part: f"{stem}.{ending}" for part, ending in endings.items() if f"{stem}.{ending}" in known}


def _packed(cls: type[Quantisation], method: str, stated: Mapping[str, Any]) -> Quantisation:
    bits = int(stated.get("bits", stated.get("w_bit", 4)))
    variant = str(stated.get("version") or stated.get("checkpoint_format") or stated.get("format") or method).lower()
    if bits not in _WIDTHS:
        raise NotReadableError(f"{method} of {bits} bits")
    if method == "awq":
        if variant not in ("gemm", "awq") or bits != 4:
            raise NotReadableError(f"awq of {bits} bits in the version {variant}")
        return cls(method, bits=bits)
    if variant not in _GPTQ_FORMATS:
        raise NotReadableError(f"gptq in the format {variant}")
    return cls(method, bits=bits, zero_offset=_GPTQ_FORMATS[variant])


def _compressed_bits(stated: Mapping[str, Any]) -> int:
    """Bits of packed integers, of which all groups must have as many."""
    groups = list((stated.get("config_groups") or {}).values())
    formats = {str(group.get("format") or stated.get("format")) for group in groups} | {str(stated.get("format"))}
    foreign = sorted(formats - {*_COMPRESSED, "None", "mixed-precision"})
    for name in ("sparsity_config", "transform_config"):
        stated_part = stated.get(name) or {}
        if stated_part and stated_part.get("format", "") != "dense" and any(stated_part.values()):
            foreign.append(name)
    if foreign:
        raise NotReadableError(f"compressed-tensors, {foreign[0]}")
    weights = [group.get("weights") or {} for group in groups]
    widths = {int(args.get("num_bits", 8)) for args in weights if args.get("type") == "int"}
    if len(widths) > 1:
        raise NotReadableError(f"compressed-tensors of {' and '.join(map(str, sorted(widths)))} bits")
    bits = next(iter(widths), 8)
    if bits not in _WIDTHS:
        raise NotReadableError(f"compressed-tensors of {bits} bits")
    return bits
