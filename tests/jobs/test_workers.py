"""How many workers a cluster has room for, node by node."""

from collections.abc import Callable

import pytest

from cluster.local import LocalCluster
from jobs.training import Scaling
from jobs.workers import check_fits, room_for
from library.errors import InputError


def test_a_worker_has_to_fit_one_node(local_cluster: Callable[..., LocalCluster]) -> None:
    local_cluster(nodes=2, cpus_per_node=3)
    assert room_for(Scaling(cpus_per_worker=2)) == 2, "the CPUs of both nodes together would be room for three"
    with pytest.raises(
        InputError, match=r"3 workers of 2 CPU do not fit: the cluster has 6 CPU on 2 nodes, enough for 2; use fewer"
    ):
        check_fits(Scaling(workers=3, cpus_per_worker=2))
    check_fits(Scaling(workers=(2, 9), cpus_per_worker=2))
    check_fits(Scaling(workers=3, cpus_per_worker=2, autoscale=True))
    with pytest.raises(InputError, match=r"1 workers of 1 CPU and 1 GPU do not fit: .* 6 CPU and 0 GPU on 2 nodes"):
        check_fits(Scaling(gpu=True))
    assert room_for(Scaling(cpus_per_worker=0.1)) == 60
