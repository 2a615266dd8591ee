"""What tests of the runtime share: a pool of four workers, of which each uses as many as it needs, and tiny models."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rank_pool import RankPool
from tests.runtime.checkpoints import Oracle, make_oracle, save_checkpoint


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    ranks = RankPool(4)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an OLMoE."""
    folder = tmp_path_factory.mktemp("olmoe")
    save_checkpoint("olmoe", folder)
    return folder


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with biases, windows, and an attention that adds its mask."""
    folder = tmp_path_factory.mktemp("gpt_oss")
    save_checkpoint("gpt_oss", folder)
    return folder


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """An OLMoE and what the plain model says."""
    return make_oracle("olmoe", tmp_path_factory.mktemp("olmoe"))
