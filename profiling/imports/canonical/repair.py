"""From the survey of a source of tokens to what is done to them; every repair is a finding.

Shape letters: T tokens, L layers of the source (dense ones included), E experts per layer, K top-k.
"""

from dataclasses import dataclass

import numpy as np

from moeplace.profiling.errors import InputError
from moeplace.profiling.imports.canonical.findings import Findings, ranges, share
from moeplace.profiling.imports.canonical.kernels import Mending
from moeplace.profiling.imports.canonical.options import ImportOptions
from moeplace.profiling.imports.canonical.survey import FILLS, Survey

_FEW_ROWS = 16
"""Rows below which a column of one number says nothing."""
_PADDED_TOKENS, _PADDED_SHARE = 16, 0.01
_SAMPLED = 20
"""Ids per possible expert from which a gap below the greatest one is no accident."""


@dataclass(frozen=True)
class Repair:
    """What is done to the tokens of a source.

    Attributes:
        kept: rows of the source that are MoE layers, rising.
        top_k: columns that are used.
        mending: of the kept layers.
        padding: tokens with this set of experts in all layers are left out; () = none are.
        exact_zeros: gate weights tell which zeros are null experts.
    """

    kept: np.ndarray
    top_k: int
    mending: Mending
    padding: tuple[int, ...] = ()
    exact_zeros: bool = False


def find_repair(
    survey: Survey, options: ImportOptions, findings: Findings, *, decoder_rows: bool, weighted: bool
) -> Repair:
    """Judge a survey.

    Args:
        survey: of the whole source.
        options: what the user says.
        findings: gets a sentence for everything that is mended.
        decoder_rows: the rows of the source are decoder layers, of which dense ones say 0.
        weighted: there are gate weights.

    Raises:
        InputError: no token, or no layer, has an expert.
        FormatError: a finding, where findings are refused.
    """
    tallies = survey.tallies
    if tallies.least[0] < -1:
        raise InputError(f"{findings.source}: expert id {tallies.least[0]} must be at least -1 (-1 = none)")
    if survey.tokens and (tallies.none_L == survey.tokens).all():
        raise InputError(f"{findings.source}: no token has an expert: all ids are -1")
    kept = _moe_rows(survey, findings, decoder_rows)
    fills = _fill_values(survey, options, findings)
    if survey.blank:
        findings.drop(
            survey.blank, survey.tokens, "tokens",
            "have no expert in any layer (-1, or 0 throughout): the engine did not capture them; they were left out",
            kind="tokens that were not captured",
        )  # fmt: skip
    zero_means_none_L, kept_L = _zeros(survey, kept, findings, weighted)
    _report_repeats(survey, kept, zero_means_none_L, findings)
    top_k = _used_columns(survey, kept, fills, findings)
    mending = Mending(np.array(fills, dtype=np.int64), zero_means_none_L, kept_L, np.zeros(len(kept), np.int64))
    padding = _padding(survey, options, findings, fills)
    return Repair(kept, top_k, mending, padding, exact_zeros=weighted)


def _moe_rows(survey: Survey, findings: Findings, decoder_rows: bool) -> np.ndarray:
    """Rows of the source in which tokens have experts that a router could have chosen."""
    tallies, top_k = survey.tallies, survey.tallies.fill_columns_FK.shape[1]
    dense_L = tallies.constant_L + tallies.none_L == survey.tokens
    if top_k == 1 and decoder_rows:
        dense_L |= tallies.single_zero_L + tallies.none_L == survey.tokens
    kept = np.flatnonzero(~dense_L)
    if not len(kept):
        raise InputError(
            f"{findings.source}: no layer has different experts for a token, so none is an MoE layer "
            f"(all {len(dense_L)} hold one id {top_k} times)"
        )
    if len(kept) < len(dense_L):
        findings.remark_dense(np.flatnonzero(dense_L))
    if top_k == 1 and decoder_rows:
        findings.note("layers whose ids are all 0 were taken for dense ones")
    return kept


def _fill_values(survey: Survey, options: ImportOptions, findings: Findings) -> list[int]:
    """Greatest numbers of integer types that stand for no expert."""
    tallies = survey.tallies
    layers, top_k = len(tallies.none_L), tallies.fill_columns_FK.shape[1]
    rows = survey.tokens * layers - int(tallies.constant_L.sum() + tallies.none_L.sum())
    experts = options.experts_of_layers(layers, np.arange(layers)) if _is_one_number(options) else None
    found = []
    for index, value in enumerate(FILLS.tolist()):
        columns_K = tallies.fill_columns_FK[index]
        total = int(columns_K.sum())
        if not total:
            continue
        whole = rows >= _FEW_ROWS and bool((columns_K >= rows).any())
        beyond = experts is not None and value >= int(experts.max()) + options.null_experts
        greatest = int(tallies.greatest_L.max())
        apart = greatest < 3 * (value + 1) // 4 and rows * top_k >= _SAMPLED * (value + 1)
        if tallies.fill_twice_F[index] or whole or beyond or apart:
            found.append(value)
            findings.warn(
                f"{share(total, survey.tokens * layers * top_k)} of the ids are {value}, which no router chooses so: "
                f"the fill value of an integer type, read as no expert (--fill-value {value} says the same)"
            )
    return found


def _is_one_number(options: ImportOptions) -> bool:
    return isinstance(options.num_experts, int)


def _zeros(survey: Survey, kept: np.ndarray, findings: Findings, weighted: bool) -> tuple[np.ndarray, np.ndarray]:
    """In which layers id 0 also stands for null experts, and what share of its single appearances is expert 0.

    Where null experts come at random, rows with two or more of them tell how many rows have one. So many zeros, and
    those above the mean of the other experts, are taken for null experts, evenly over the tokens.
    """
    tallies = survey.tallies
    zeros_l, twice_l = tallies.zeros_L[kept], tallies.twice_L[kept]
    is_null_l = (zeros_l > 0) & (zeros_l >= 10 * twice_l)
    share_l = np.ones(len(kept))
    if not is_null_l.any():
        return is_null_l, share_l
    rows_l = np.maximum(survey.tokens - tallies.none_L[kept] - tallies.constant_L[kept], 1)
    single_l = tallies.single_zero_L[kept]
    if not weighted:
        counts_lM = survey.counts_LM[kept, 1:]
        mean_l = counts_lM.sum(axis=1) / np.maximum((counts_lM > 0).sum(axis=1), 1)
        rate_l = np.sqrt(2 * zeros_l / rows_l)
        expected_l = 2 * rate_l * np.exp(-rate_l) * rows_l
        taken_l = np.clip(single_l - mean_l, 0, expected_l) * is_null_l
        share_l = 1 - taken_l / np.maximum(single_l, 1)
    count, rows = int(zeros_l[is_null_l].sum()), int(rows_l.sum())
    rest = "" if weighted else ", and single zeros above the mean load of an expert with them"
    findings.warn(
        f"{share(count, rows)} of the rows ({count} of {rows}) have id 0 more than once: zero-computation experts that "
        f"the engine rewrote to 0; read as no expert{rest} (record the router's own ids and give --null-experts)"
    )
    findings.dropped.append(f"{count} rows with null experts written as 0")
    return is_null_l, share_l


def _report_repeats(survey: Survey, kept: np.ndarray, zero_means_none_L: np.ndarray, findings: Findings) -> None:
    tallies = survey.tallies
    zeros_l, twice_l = tallies.zeros_L[kept], tallies.twice_L[kept]
    plain = int(twice_l.sum() + zeros_l[~zero_means_none_L].sum())
    single = max(int((tallies.constant_L[kept] - survey.blank)[~zero_means_none_L].sum()), 0)
    count, rows = plain + single, survey.tokens * len(kept)
    if count:
        findings.drop(
            count, rows, "rows",
            "hold an expert more than once, which a router never chooses: padding or a damaged record; "
            "the repeats were left out (--strict refuses them)",
            kind="rows with a repeated expert, cut to one",
        )  # fmt: skip


def _used_columns(survey: Survey, kept: np.ndarray, fills: list[int], findings: Findings) -> int:
    """K without the columns that no row needs."""
    tallies, top_k = survey.tallies, survey.tallies.fill_columns_FK.shape[1]
    alone = sum(int(tallies.fill_twice_F[index] == 0) for index, value in enumerate(FILLS.tolist()) if value in fills)
    used = max(min(top_k, int(tallies.widest_L[kept].max()) - (alone if top_k > 1 else 0)), 1)
    if used < top_k:
        findings.note(f"top-k is {used}: {top_k - used} of {top_k} columns hold no expert")
    return used


def _padding(survey: Survey, options: ImportOptions, findings: Findings, fills: list[int]) -> tuple[int, ...]:
    """The set of experts of padded tokens, where they are to be left out."""
    if not survey.alike:
        return ()
    experts, count = survey.alike.most_common(1)[0]
    is_rare = count < max(_PADDED_TOKENS, _PADDED_SHARE * survey.tokens) or 2 * count <= survey.alike.total()
    if is_rare or set(experts) & set(fills):
        return ()
    shown = ranges(np.array(experts))
    what = f"have the experts {shown}, and no others, in every layer: padded rows, it seems"
    if options.drop_padding:
        findings.drop(count, survey.tokens, "tokens", f"{what}; they were left out", kind="padded tokens")
        return experts
    findings.warn(
        f"{share(count, survey.tokens)} of the tokens ({count} of {survey.tokens}) {what} "
        "(--drop-padding leaves them out)"
    )
    return ()
