from collections.abc import Iterator

import pytest
from cluster import Cluster, unavailable_reason


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A SLURM with two nodes; the test is skipped if it cannot run here."""
    reason = unavailable_reason()
    if reason:
        pytest.skip(reason)
    cluster = Cluster()
    yield cluster
    cluster.close()
