"""A start of training compiles nothing, on a machine that may have no compiler, and imports no tracker."""

import os
import subprocess
import sys
from pathlib import Path

START = """
import os
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
import torch
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
from training.ops import leave_out_ops
leave_out_ops()
import deepspeed
deepspeed.init_distributed("gloo")
import sys
print(deepspeed.comm.comm.cdb.shm_comm_op, "mlflow" in sys.modules)
import mlflow
"""


def test_deepspeed_starts_without_a_compiler(tmp_path: Path) -> None:
    own = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "/no/compiler", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", START], env=os.environ | own, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "None False"
    assert list(tmp_path.rglob("*.so")) == []
