"""Families of `transformers`: a few in the suite, all of them in the soak; docs/models.md says what came of them."""

from pathlib import Path

import pytest

from tests.family_matrix import judge_all, judge_family, rows_of_page, table
from tests.model_families import moe_families
from tests.rank_pool import RankPool

QUICK = (
    "hunyuan_v1_moe",  # a shared expert of another name
    "qwen3_5_moe_text",  # linear attention: a recurrent state
    "nemotron_h",  # layers that are one mixer each; experts without a gate
    "longcat_flash",  # zero-computation experts
    "llama4_text",  # experts that are not told who is whose
    "gemma4_text",  # experts outside a block
    "deepseek_v32",  # an index beside the K/V
)


@pytest.mark.parametrize("family", QUICK)
def test_families_are_profiled_and_served_as_the_page_says(pool: RankPool, tmp_path: Path, family: str) -> None:
    """Each by another trait; on three ranks, whatever the mode."""
    result = judge_family(pool, family, tmp_path / family, sizes=(3,), seed=0)
    assert result.row() == rows_of_page()[family]
    assert result.profile == result.modes["dispatch-combine"] == result.modes["allgather"] == "exact"


def test_the_page_has_every_family_of_the_installed_transformers() -> None:
    """Found by looking at modules; a new release shows here what the page lacks."""
    assert sorted(rows_of_page()) == sorted(moe_families())


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_family_is_profiled_and_served_as_the_page_says(pool: RankPool, tmp_path: Path) -> None:
    """The whole table, on 1 to 4 ranks."""
    results = judge_all(pool, tmp_path, moe_families(), sizes=(1, 2, 3, 4))
    rows = rows_of_page()
    assert table(results).splitlines()[2:] == [rows[family].rstrip("\n") for family in moe_families()]
