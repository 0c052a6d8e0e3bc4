"""Finds out whether the cluster can add nodes by itself, from what Ray's own monitor writes on the head."""

import json
import logging
from typing import Any

log = logging.getLogger(__name__)

STATUS_KEY = b"__autoscaling_status"
NAMESPACE = b"__autoscaler"
IS_V2_KEY = b"__autoscaler_v2_enabled"


def has_autoscaler() -> bool | None:
    """Return whether a cluster launcher or KubeRay adds nodes to the cluster; None while that is not known.

    Every head runs a monitor (with KubeRay, in a container next to it). Without configured node types the monitor only
    mirrors the existing nodes: autoscaler v1 reports each as its own node type, named after the node; v2 (`ray up`,
    KubeRay with autoscaler v2) recognises its nodes by the instance ids and type names that it assigned.
    """
    try:
        return _read()
    except Exception as error:  # Ray's internals may change, and the head may be away for a moment
        log.debug("%s", error)
        return None


def _read() -> bool | None:
    import ray
    from ray._private.state import state
    from ray.experimental.internal_kv import _internal_kv_get

    if state.get_cluster_config() is not None:  # a platform has said what nodes it can add
        return True
    is_v2 = _internal_kv_get(IS_V2_KEY, namespace=NAMESPACE)
    if is_v2 == b"1":
        return any(node.ray_node_type_name or node.instance_id for node in _node_states())
    if is_v2 != b"0":
        return None
    report = json.loads(_internal_kv_get(STATUS_KEY) or b"{}").get("autoscaler_report")
    if report is None:  # the monitor's first words come some seconds after the head's
        return None
    kinds = {**(report.get("active_nodes") or {}), **(report.get("idle_nodes") or {})}
    is_mirror = any(f"node_{node['NodeID']}" in kinds for node in ray.nodes() if node["Alive"])
    return not is_mirror


def _node_states() -> list[Any]:
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    client = ray._raylet.GcsClient(ray.get_runtime_context().gcs_address)
    return list(get_cluster_resource_state(client).node_states)
