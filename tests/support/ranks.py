"""Several ranks on this machine without Ray: each a process, with gloo, DeepSpeed and our engine."""

import multiprocessing
import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

IMPORTED_ONCE = [
    "deepspeed.runtime.zero.muon.muon_optimizer", "diffusers.models.unets.unet_2d_condition",
    "training.state.checkpoint", "training.engine",
]  # fmt: skip
"""By a server that ranks are forked from: fourteen seconds of each otherwise."""


def on_ranks(world_size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` gives on each rank; importable functions and picklable values only."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED_ONCE)
        torch.multiprocessing.start_processes(
            _rank, (world_size, port, folder, work, arguments), nprocs=world_size, start_method="forkserver"
        )
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(world_size)]


def _rank(rank: int, world_size: int, port: int, folder: str, work: Callable[..., Any], arguments: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_WAIT_POLICY": "PASSIVE",
    }  # fmt: skip
    torch.set_num_threads(1)
    Path(folder, str(rank)).write_bytes(pickle.dumps(work(*arguments)))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
