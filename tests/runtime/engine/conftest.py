"""Models of all families, with what the plain ones say."""

import pytest

from tests.runtime.checkpoints import FAMILIES, Oracle, make_oracle


@pytest.fixture(scope="module", params=FAMILIES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return make_oracle(request.param, tmp_path_factory.mktemp(request.param))
