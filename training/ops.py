"""DeepSpeed's communication op, compiled at the first start on a machine: by one process, whatever became of others.

torch marks a compilation by a file that a killed process leaves behind, and everyone after it would wait for ever.
"""

import os
import sys
from pathlib import Path

import filelock
from torch.utils import cpp_extension

OP = "ShareMemCommBuilder"
MARK = "lock"  # torch's
OURS = "mapo.lock"  # held by a process, and let go when that dies


def build_ops() -> None:
    """Compile the op, or load what was compiled; of the workers of a machine one compiles and the others wait.

    With a GPU there is no such op, and nothing is done.
    """
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(OP)
    if builder is None or not hasattr(builder, "NAME"):
        return
    folder = Path(cpp_extension._get_build_directory(builder.NAME, verbose=False))
    # ninja lies beside this interpreter and need not be on PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with filelock.FileLock(folder / OURS):
        (folder / MARK).unlink(missing_ok=True)  # nobody else of ours compiles now
        builder.load(verbose=False)
