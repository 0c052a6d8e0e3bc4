"""Light actors share a GPU: as many as are asked for, each with its part of the node's CPUs."""

import json
from collections.abc import Callable

SHARED = """
import json, logging, os
import ray
from pipelines.units.pool import demand_of_part, share_devices
from pipelines.units.workers import Workers

ray.init(address="local", num_cpus=9, num_gpus=2, include_dashboard=False, log_to_driver=False,
         logging_level=logging.ERROR, object_store_memory=100 << 20)

def pool(count, device="gpu", num_units=100):
    found = share_devices(Workers("evaluate", num_workers=count, device=device), num_units)
    demand = demand_of_part(found)
    options = {name: found.options.get(name) for name in ("num_gpus", "num_cpus")}
    return [found.least, found.most, found.num_threads, options, demand.needed, demand.has_node()]

print(json.dumps([pool(1), pool(4), pool("2..99"), pool(4, num_units=1), pool(2, "cpu")]))
"""


def test_actors_share_gpus_and_cpus(run_python: Callable[[str], str]) -> None:

    one, four, many, few, on_cpus = json.loads(run_python(SHARED))
    assert one == [1, 1, 4, {"num_gpus": 1.0, "num_cpus": 4}, {"GPU": 1.0, "CPU": 4}, True]
    assert four == [4, 4, 2, {"num_gpus": 0.5, "num_cpus": 2}, {"GPU": 0.5, "CPU": 2}, True]
    assert many == [2, 99, 1, {"num_gpus": 0.25, "num_cpus": 1}, {"GPU": 0.25, "CPU": 1}, True]
    assert few[:2] == [1, 1]
    assert few[3] == four[3], "the part of an actor does not depend on the amount of work"
    assert on_cpus == [2, 2, 4, {"num_gpus": None, "num_cpus": 1}, {"CPU": 1}, True]
