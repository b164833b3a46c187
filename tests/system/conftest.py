"""One cluster of two agents for the tests that leave it as they found it."""

from collections.abc import Iterator

import pytest
from system.cluster import Cluster, cluster


@pytest.fixture(scope="session")
def dure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("shared") / "d", agents=2) as running:
        yield running
