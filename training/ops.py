"""What DeepSpeed would compile and import at its start: nothing that training here does not use."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

INFERENCE_OP = "deepspeed_shm_comm"  # an all-reduce between the CPU ranks of a node


def leave_out_ops() -> None:
    """Call before DeepSpeed starts its process group.

    On a machine without GPUs `TorchBackend` compiles, a minute at the first start, an op that only DeepSpeed's
    inference calls. What is asked for (`train.offload: nvme`) is still compiled: ninja lies beside this interpreter and
    need not be on PATH.
    """
    with _without_mlflow():
        import deepspeed.ops

    deepspeed.ops.__compatible_ops__[INFERENCE_OP] = False
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


@contextlib.contextmanager
def _without_mlflow() -> Iterator[None]:
    """DeepSpeed's autotuner imports it where it is installed: two seconds of the start of every worker."""
    if "mlflow" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # which makes an import of it fail
    try:
        yield
    finally:
        del sys.modules["mlflow"]
