from collections.abc import Iterator

import pytest
from cluster import Cluster, why_not


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A two-node SLURM."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    cluster = Cluster()
    yield cluster
    cluster.close()
