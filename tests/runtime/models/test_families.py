"""Families of `transformers`: a few in the suite, all of them in the soak; docs/models.md says what came of them."""

from pathlib import Path

import pytest

from tests.family_matrix import PUBLISHED_FORMS, judge_all, judge_family, judge_forms, rows_of_page, table
from tests.model_families import families_with_back_ends, moe_families
from tests.rank_pool import RankPool

QUICK = (
    "qwen3_5_moe_text",  # linear attention: a recurrent state
    "nemotron_h",  # layers that are one mixer each; experts without a gate
    "longcat_flash",  # zero-computation experts
    "llama4_text",  # experts that are not told who is whose
)


@pytest.mark.parametrize("family", QUICK)
def test_families_are_profiled_and_served_as_the_page_says(pool: RankPool, tmp_path: Path, family: str) -> None:
    """Each by another trait; on three ranks, whatever the mode."""
    result = judge_family(pool, family, tmp_path / family, sizes=(3,), seed=0)
    result.quantised = rows_of_page()[family].split(" | ")[6]
    assert result.row() == rows_of_page()[family]
    assert result.profile == result.modes["dispatch-combine"] == result.modes["allgather"] == "exact"


@pytest.mark.parametrize("family", ["nemotron_h", "granitemoe"])
def test_families_are_read_in_the_quantised_forms_that_the_page_says(tmp_path: Path, family: str) -> None:
    """Experts that have matrices of their own, and experts in one tensor a layer."""
    found, wrong = judge_forms(family, tmp_path, PUBLISHED_FORMS, seed=0)
    assert (found, wrong) == (rows_of_page()[family].split(" | ")[6], "")


def test_the_page_has_every_family_that_takes_back_ends_for_experts() -> None:
    """Found by looking at sources; a new release of `transformers` shows here what the page lacks."""
    assert set(families_with_back_ends()) <= set(rows_of_page())


@pytest.mark.soak
def test_the_page_has_every_family_of_the_installed_transformers() -> None:
    """Found by looking at modules, all of them imported."""
    assert sorted(rows_of_page()) == sorted(moe_families())


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_family_is_profiled_and_served_as_the_page_says(pool: RankPool, tmp_path: Path) -> None:
    """The whole table, on 1 to 4 ranks."""
    results = judge_all(pool, tmp_path, moe_families(), sizes=(1, 2, 3, 4))
    rows = rows_of_page()
    assert table(results).splitlines()[2:] == [rows[family].rstrip("\n") for family in moe_families()]
