"""Makes `old_storage.tar.xz` and `old_storage.json`, which tests/orchestration/test_old_storage.py reads.

Called once, in a working tree of commit 9b528e8 (the last one before the modules moved into rooms) into which this file
and the test had been copied:

    git worktree add /tmp/before 9b528e8; cd /tmp
    B=/tmp/before; PYTHONPATH=$B:$B/tests:$B/tests/orchestration python $B/tests/data/make_old_storage.py

It runs that tree's `mapo`, and refuses another one. Never call it with a later version: what that makes is no old
storage.

Run `finished` does all stages; it trains adapters on one worker, as the first of `rounds: continue`. Run `unfinished`
trains the whole UNet and an average on two ZeRO ranks. It is run to its end, for what the test expects, and forgotten;
then it is run until it has its first checkpoint, and told to stop.
"""

import importlib.metadata
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import command
import yaml
from command import Command
from factories import new_pipeline, photo_pairs, write_parquet
from test_old_storage import ARCHIVE, BUCKET, EXPECTED, Bucket, arithmetic, losses

COMMIT = "9b528e8b8778da0089695af8c47a3679ebe6234c"
LIBRARIES = ("torch", "diffusers", "transformers", "deepspeed", "ray", "deltalake", "pyarrow", "safetensors")
STOP_AFTER, ATTEMPTS = 4, 8
TREE = Path(__file__).parents[2]
MAPO = f"""#!{sys.executable}
import orchestration, pipelines, training
for package in (orchestration, pipelines, training):
    assert list(package.__path__) == ["{TREE}/" + package.__name__], package
from orchestration.cli import entry
entry()
"""
SIZES = ((64, 64), (80, 60), (48, 96))

SHARED: dict[str, Any] = {
    "storage": f"s3://{BUCKET}/storage",
    "seed": 16,
    "ingest": {
        "sources": [{"format": "pickapic", "path": f"s3://{BUCKET}/photos/*.parquet"}],
        "validation_ratio": 0.3,
        "max_drop_ratio": 0.2,
    },
    "encode": {"model": f"s3://{BUCKET}/base", "resolution": 64, "batch_size": 8},
}
TRAIN: dict[str, Any] = {
    "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-3, "precision": "fp32",
    "gradient_checkpointing": False, "prompt_dropout": 0.2, "keep_checkpoints": 1, "keep_best": False,
}  # fmt: skip
FINISHED = {
    "name": "finished",
    **SHARED,
    "train": {
        **TRAIN, "num_workers": 1, "max_steps": 4, "checkpoint_every": 2, "validate_every": 2, "lora": {"rank": 2},
        "rounds": "continue",
    },
    "evaluate": {"num_samples": 2, "num_inference_steps": 2, "batch_size": 2},
}  # fmt: skip
UNFINISHED = {
    "name": "unfinished",
    **SHARED,
    "train": {
        **TRAIN, "num_workers": 2, "max_steps": 16, "checkpoint_every": STOP_AFTER, "validate_every": 5,
        "warmup_steps": 3, "ema": {"decay": 0.9},
    },
}  # fmt: skip


def write_base(folder: Path) -> None:
    """The tests' tiny SDXL with a UNet and a VAE of fewer channels."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    pipeline = new_pipeline()
    torch.manual_seed(16)
    vae = {**pipeline.vae.config, "block_out_channels": (4, 8, 8)}
    pipeline.vae = AutoencoderKL.from_config(vae)
    changes = {"block_out_channels": (8, 8, 8), "attention_head_dim": (1, 1, 1), "norm_num_groups": 4}
    pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, **changes})
    pipeline.save_pretrained(folder, safe_serialization=True)


def serve() -> subprocess.Popen[bytes]:
    """An S3 server of this process's own; the environment points to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1", AWS_EC2_METADATA_DISABLED="true", RAY_AUTH_MODE="disabled", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    arguments = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return server
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"the S3 server did not start: {server.returncode}")


def mapo(*arguments: str | Path) -> None:
    """Call a command that has to go well; again where the machine is too busy for Ray to start."""
    for _ in range(ATTEMPTS):
        with Command(*arguments) as called:
            code = called.wait()
        print(called.output, called.errors, flush=True)
        if code == 0:
            return
    raise SystemExit(f"mapo {arguments} ended with {code}")


def expect(bucket: Bucket, base: Path) -> dict[str, Any]:
    """What the training gave that nobody stopped."""
    from torch.backends.cpu import get_cpu_capability

    trained = bucket.read("runs/unfinished/stages/train.json")["details"]
    (checkpoint,) = bucket.checkpoints("unfinished")
    return {
        "commit": COMMIT,
        "processor": f"{platform.machine()}, {get_cpu_capability()}",
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "arithmetic": arithmetic(base),
        "starts": trained["starts"],
        "pairs": trained["digest"],
        "losses": losses(trained["history"]),
        "digests": bucket.digests(checkpoint),
    }


def stop_after_the_first_checkpoint(bucket: Bucket, file: Path) -> None:
    """Train until there is a checkpoint; then Ctrl-C. Anew where that came too late."""
    for _ in range(ATTEMPTS):
        bucket.fs.rm(f"{BUCKET}/storage/runs/unfinished", recursive=True)
        with Command("train", file) as train:
            while train.process.poll() is None and not bucket.checkpoints("unfinished"):
                train.look()
                time.sleep(0.05)
            train.process.send_signal(signal.SIGINT)
            train.wait()
        print(train.output, train.errors, flush=True)
        steps = [bucket.read(f"{each}/manifest.json")["step"] for each in bucket.checkpoints("unfinished")]
        if steps and STOP_AFTER <= steps[-1] < UNFINISHED["train"]["max_steps"]:
            return
    raise SystemExit(f"stopped at steps {steps}")


def download(bucket: Bucket, folder: Path) -> None:
    """All objects as files below a folder."""
    for name in bucket.fs.find(BUCKET):
        file = folder / name.removeprefix(f"{BUCKET}/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bucket.fs.cat_file(name))


def pack(folder: Path) -> None:
    """The archive of a folder: no times and no owners in it, and equal files side by side."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode = 0, 0, 0, "", "", 0o644
        return member

    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
        files = (file for file in folder.rglob("*") if file.is_file())
        for file in sorted(files, key=lambda file: (file.name, file)):
            archive.add(file, file.relative_to(folder), filter=plain)


def main() -> None:
    """Make both files anew."""
    with tempfile.TemporaryDirectory() as name:
        command.MAPO, command.DEADLINE_S = Path(name) / "mapo", 3600
        command.MAPO.write_text(MAPO)
        command.MAPO.chmod(0o755)
        work, bucket, server = Path(name), Bucket(), serve()
        os.environ["MAPO_CACHE"] = str(work / "cache")
        try:
            rows = photo_pairs(32, seed=16, num_ties=2, num_damaged=3, num_prompts=8, sizes=SIZES)
            for number, some in enumerate((rows[:20], rows[20:])):
                write_parquet(work / "bucket" / "photos" / f"pairs-{number}.parquet", some)
            write_base(work / "bucket" / "base")
            bucket.fill(work / "bucket")
            configs = {each["name"]: work / "packed" / f"{each['name']}.yaml" for each in (FINISHED, UNFINISHED)}
            (work / "packed").mkdir()
            for config in (FINISHED, UNFINISHED):
                configs[config["name"]].write_text(yaml.safe_dump(config, sort_keys=False))
            mapo("run", configs["finished"])
            mapo("train", configs["unfinished"])
            EXPECTED.write_text(json.dumps(expect(bucket, work / "bucket" / "base"), indent=1) + "\n")
            stop_after_the_first_checkpoint(bucket, configs["unfinished"])
            download(bucket, work / "packed" / "bucket")
            pack(work / "packed")
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main()
