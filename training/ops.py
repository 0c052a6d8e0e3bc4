"""Keeps DeepSpeed from compiling and importing parts that training does not use when it starts."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

INFERENCE_OP = "deepspeed_shm_comm"  # an all-reduce between the CPU ranks of a node


def leave_out_ops() -> None:
    """Skip unused ops and imports; call this before DeepSpeed starts its process group.

    On a machine without GPUs, the first start of `TorchBackend` spends a minute compiling an op that only DeepSpeed's
    inference calls. Ops that the configuration needs (`train.offload: nvme`) are still compiled: ninja is found next to
    this interpreter and need not be on PATH.
    """
    with _without_mlflow():
        import deepspeed.ops

    deepspeed.ops.__compatible_ops__[INFERENCE_OP] = False
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


@contextlib.contextmanager
def _without_mlflow() -> Iterator[None]:
    """Hide mlflow: DeepSpeed's autotuner imports it if installed, which costs every worker's start two seconds."""
    if "mlflow" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # which makes an import of it fail
    try:
        yield
    finally:
        del sys.modules["mlflow"]
