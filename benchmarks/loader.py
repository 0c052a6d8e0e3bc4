"""Our loader beside webdataset, MosaicML streaming and litdata: `python -m benchmarks.loader --peers PYTHON`.

The same pairs (SDXL latents at 1024 x 1024 and prompt embeddings, float16) are kept by each hand as its users keep
them, and read shuffled, in batches of 8, from the local disk's page cache and from an S3 server on this machine. Ours
checks the CRC-32 of every sample and keeps text once a prompt; the others check nothing and keep text with every pair.
Ours reads with threads of one process, the others with two worker processes; all have the same CPUs.

Every number is of a process of its own, round after round; the best of each hand counts. Prints samples a second,
CPU time a sample, peak memory of the process tree (RSS, in which forked pages count twice, and PSS, in which they do
not), and the time to the first batch after a resume at step 10,000. Writes results/loader.json. PYTHON is an
interpreter with torch, webdataset, litdata, mosaicml-streaming, s3fs and psutil; `--small` runs ours and webdataset
alone, with the interpreter that runs this.
"""

import argparse
import json
import math
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.loader_samples import BATCH_SIZE, NUM_WORKERS, PAIRS_A_PROMPT, SHARD_BYTES, STEP
from pipelines.dataset.processes import TORCH_ENVIRONMENT

RESULTS = Path(__file__).parent / "results" / "loader.json"
BUCKET = "loader-benchmark"
OURS, PEERS = "benchmarks.loader_ours:", "benchmarks.loader_peers:"
LOCAL = {
    "ours": f"{OURS}Ours", "ours, no text kept": f"{OURS}OursWithoutTexts", "webdataset": f"{PEERS}WebDataset",
    "streaming": f"{PEERS}Streaming", "litdata": f"{PEERS}LitData",
}  # fmt: skip
S3 = LOCAL | {"ours, shard cache": f"{OURS}OursWithCache"}
SMALL = ("ours", "webdataset")
RESUMED = ("ours", "streaming", "litdata")  # webdataset has no state
PSS_EVERY_S, RSS_EVERY_S = 1.0, 0.05


def folder_of(hand: str) -> str:
    """Where a hand's samples lie: variants share them."""
    return hand.partition(",")[0]


class Hands:
    """Runs hands, each in a process of its own.

    Args:
        peers: The interpreter of the others.
        num_pairs: Of the data set.
    """

    def __init__(self, peers: str, num_pairs: int) -> None:
        self._peers = peers
        self._num_pairs = num_pairs
        self.environment: dict[str, str] = {}

    def run(self, what: str, hand: str, place: str, state: dict[str, Any] | None = None) -> dict[str, Any]:
        """One hand; what it printed last, and its peak memory."""
        is_ours = hand.startswith(OURS)
        command = [sys.executable if is_ours else self._peers, "-W", "ignore", "-m", "benchmarks.loader_samples"]
        command += [what, hand, place, "--pairs", str(self._num_pairs), "--state", json.dumps(state or {})]
        environment = os.environ | self.environment | (TORCH_ENVIRONMENT if is_ours else {})  # as `mapo train` has it
        with tempfile.TemporaryFile("w+") as out:
            process = psutil.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True)
            peaks = watch(process)
            out.seek(0)
            printed = out.read()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{printed[-3000:]}")
        if what == "write":
            return {}
        found: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return found if what == "save" else found | peaks


def watch(process: psutil.Popen) -> dict[str, float]:
    """Wait for a process; the peak memory of it and all below it, in MB."""
    peaks, next_pss = {"rss_mb": 0.0, "pss_mb": 0.0}, 0.0
    while process.poll() is None:
        try:
            tree = [process, *process.children(recursive=True)]
            peaks["rss_mb"] = max(peaks["rss_mb"], sum(each.memory_info().rss for each in tree) / 1e6)
            if time.monotonic() > next_pss:
                next_pss = time.monotonic() + PSS_EVERY_S
                peaks["pss_mb"] = max(peaks["pss_mb"], sum(each.memory_full_info().pss for each in tree) / 1e6)
        except psutil.Error:
            pass
        time.sleep(RSS_EVERY_S)
    return {name: round(peak) for name, peak in peaks.items()}


class Server:
    """An S3 server of this machine that holds the samples of all hands."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        address = ["-H", "127.0.0.1", "-p", str(port)]
        url = f"http://127.0.0.1:{port}"
        self.environment = {
            "AWS_ENDPOINT_URL": url, "S3_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ALLOW_HTTP": "true",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.s3_server", *address],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"TMPDIR": str(folder)},
        )  # fmt: skip
        while self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError("the S3 server did not start")

    def put(self, folder: Path) -> None:
        """Upload everything below a folder."""
        os.environ.update(self.environment)
        import s3fs

        fs = s3fs.S3FileSystem()
        fs.mkdir(BUCKET)
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            fs.put_file(str(file), f"{BUCKET}/{file.relative_to(folder).as_posix()}")

    def stop(self) -> None:
        """End it, and what it holds."""
        self._process.kill()
        self._process.wait()


def compare(hands: Hands, names: dict[str, str], root: str, num_rounds: int) -> dict[str, dict[str, Any]]:
    """The best of each hand, round after round."""
    best: dict[str, dict[str, Any]] = {}
    for _ in range(num_rounds):
        for name, hand in names.items():
            found = hands.run("read", hand, f"{root}/{folder_of(name)}")
            if found["samples_per_s"] > best.get(name, {}).get("samples_per_s", -math.inf):
                best[name] = found
    return best


def resume(hands: Hands, names: dict[str, str], root: str, num_rounds: int) -> dict[str, float]:
    """Seconds to the first batch after step STEP, the best of each hand."""
    best: dict[str, float] = {}
    for name in RESUMED:
        if name in names:
            place = f"{root}/{folder_of(name)}"
            state = {"step": STEP} if name == "ours" else hands.run("save", names[name], place)
            best[name] = min(hands.run("read", names[name], place, state)["first_s"] for _ in range(num_rounds))
    return best


def show(where: str, results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Print a table; ratios of ours to each."""
    ours = results["ours"]["samples_per_s"]
    print(f"\n{where:<22}{'samples/s':>10}{'ours / it':>10}{'CPU us':>8}{'first s':>9}{'RSS MB':>8}{'PSS MB':>8}")
    for name, found in results.items():
        rate = found["samples_per_s"]
        print(
            f"{name:<22}{rate:>10.0f}{ours / rate:>10.2f}{found['cpu_us']:>8.0f}{found['first_s']:>9.2f}"
            f"{found['rss_mb']:>8.0f}{found['pss_mb']:>8.0f}",
            flush=True,
        )
    ratios = {}
    for name, found in results.items():
        for mine in (each for each in results if folder_of(each) == "ours" != folder_of(name)):
            ratios[f"{where}: {mine} / {name}"] = round(results[mine]["samples_per_s"] / found["samples_per_s"], 2)
    return ratios


def peer_versions(peers: str) -> dict[str, str]:
    """What the other interpreter has."""
    names = ["torch", "webdataset", "litdata", "mosaicml-streaming"]
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    found: dict[str, str] = json.loads(subprocess.run([peers, "-c", code], capture_output=True, check=True).stdout)
    return found


def main() -> None:
    """Write, compare, tell."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--peers", help="an interpreter that has the other loaders")
    arguments.add_argument("--pairs", type=int, default=3000, help="a multiple of 8")
    arguments.add_argument("--rounds", type=int, default=3, help="the best of so many is told")
    arguments.add_argument("--small", action="store_true", help="ours and webdataset, 96 pairs, one round, no S3")
    arguments.add_argument("--work", type=Path, default=Path(), help="where the samples go: 8 GB")
    arguments.add_argument("--out", type=Path, default=RESULTS)
    options = arguments.parse_args()
    if not (options.small or options.peers) or options.pairs % BATCH_SIZE:
        arguments.error("give --peers or --small, and a multiple of 8 pairs")
    num_pairs, num_rounds = (96, 1) if options.small else (options.pairs, options.rounds)
    hands = Hands(options.peers or sys.executable, num_pairs)
    local = {name: LOCAL[name] for name in SMALL} if options.small else LOCAL
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mapo-bench-", dir=options.work.absolute()) as name:
        samples = Path(name, "samples")
        for hand in (each for each in local if each == folder_of(each)):
            (samples / hand).mkdir(parents=True)
            hands.run("write", local[hand], str(samples / hand))
        os.sync()  # nobody waits for the disk to take in what another wrote
        results["local"] = compare(hands, local, str(samples), num_rounds)
        ratios = show("local disk", results["local"])
        results["resume_s"] = resume(hands, local, str(samples), num_rounds)
        print(f"\nfirst batch after step {STEP:,}: {results['resume_s']}")
        if not options.small:
            server = Server(Path(name))
            try:
                server.put(samples)
                hands.environment = server.environment
                results["s3"] = compare(hands, S3, f"s3://{BUCKET}", num_rounds)
            finally:
                server.stop()
            ratios |= show("S3 on loopback", results["s3"])
    conditions = {
        "pairs": num_pairs, "pairs_a_prompt": PAIRS_A_PROMPT, "batch_size": BATCH_SIZE, "workers": NUM_WORKERS,
        "shard_bytes": SHARD_BYTES, "rounds": num_rounds, "cpu": platform.machine(), "cores": os.cpu_count(),
        "load": os.getloadavg()[0], "python": platform.python_version(), "torch": version("torch"),
        "peers": peer_versions(options.peers) if options.peers else {},
    }  # fmt: skip
    options.out.write_text(
        json.dumps({"conditions": conditions, "results": results, "ratios": ratios}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
