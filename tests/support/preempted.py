"""A driver that trains on a cluster of two nodes, one of which is taken away after a notice.

Arguments: the pickled TrainSpec, a file. Prints how the run went, as JSON.
"""

import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5", "OMP_WAIT_POLICY": "PASSIVE"}

import ray
from ray.cluster_utils import Cluster

from training.launch import train
from training.spec import TrainSpec
from training.state.checkpoint_format import list_checkpoints

GRACE_S = 20


def take_away(cluster: Cluster, node: Any, spec: TrainSpec, found: dict) -> None:
    """Once training goes: the notice that a cloud gives, and after the grace the end of the node."""
    while not spec.storage.exists(f"{spec.folder}/progress.json"):
        time.sleep(0.2)
    deadline = time.monotonic() + 400
    progress = {"step": 0}
    while progress["step"] < 1 and time.monotonic() < deadline:
        time.sleep(0.2)
        progress = json.loads(spec.storage.read(f"{spec.folder}/progress.json"))
    found["before"] = [each.step for each in list_checkpoints(spec.storage, spec.checkpoints)]
    options = {"address": cluster.address, "node-id": node.node_id, "reason": "DRAIN_NODE_REASON_PREEMPTION"}
    options |= {"reason-message": "spot", "deadline-remaining-seconds": str(GRACE_S)}
    command = [str(Path(sys.executable).parent / "ray"), "drain-node"]
    for name, value in options.items():
        command += [f"--{name}", value]
    subprocess.run(command, check=True, capture_output=True)
    end = time.monotonic() + GRACE_S
    while time.monotonic() < end and not (new := list_checkpoints(spec.storage, spec.checkpoints)):
        time.sleep(0.1)
    found["in_time"] = [each.step for each in new]
    cluster.remove_node(node)


def main() -> None:
    """Train; one node of two goes."""
    spec: TrainSpec = pickle.loads(Path(sys.argv[1]).read_bytes())
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    found: dict = {}
    thread = threading.Thread(target=take_away, args=(cluster, second, spec, found), daemon=True)
    thread.start()
    trained = train(spec, lambda progress: None)
    thread.join()
    found |= {
        "starts": trained.starts,
        "workers": len(trained.workers),
        "digest": trained.digest,
        "steps": [step["step"] for step in trained.history["steps"]],
        "losses": [step["loss"] for step in trained.history["steps"]],
    }
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
