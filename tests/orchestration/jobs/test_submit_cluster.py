"""Runs as Ray jobs on a real head with token authentication, by the installed command."""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from cut_proxy import cut_proxy
from factories import photo_pairs, write_parquet
from ray_head import BIN, RayHead, ray_head

from orchestration.cli import main
from orchestration.config import load_config
from orchestration.jobs.api import Job, Jobs
from orchestration.jobs.logs import follow
from orchestration.jobs.submit import prepare, submit
from pipelines.dataset.errors import ClusterError, JobError
from pipelines.dataset.secrets import is_secret_name

CANARY = "canary-of-this-test-0123456789"
NUM_ROWS = 32
NUM_LINES = 300
TALK = f"import time\nfor i in range({NUM_LINES}): print('line', i, 'ö', flush=True); time.sleep(0.01)"
DRIVER = """
import sys, time
from orchestration.config import load_config
from orchestration.driver.session import driving
from orchestration.cluster.signals import Stopped
from orchestration.run.context import Run
try:
    with driving(Run.open(load_config(sys.argv[1]), print)):
        print("driving", flush=True)
        time.sleep(120)
except Stopped as stop:
    print(stop, flush=True)
    sys.exit(130)
"""


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head(HF_TOKEN=CANARY) as started:
        yield started


@pytest.fixture
def jobs(head: RayHead, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    monkeypatch.setenv("RAY_JOB_HEADERS", head.headers())
    return Jobs(head.url)


@pytest.fixture(scope="module")
def folder(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to work in, with a configuration whose paths are relative, and its data."""
    place = tmp_path_factory.mktemp("submit")
    write_parquet(place / "data" / "pairs.parquet", photo_pairs(NUM_ROWS, num_prompts=4), row_group_size=16)
    settings = {
        "name": "small",
        "storage": "storage",
        "ingest": {"sources": [{"format": "pickapic", "path": "data/*.parquet"}], "validation_ratio": 0.3},
        "encode": {"model": str(tiny_pipeline), "resolution": 64, "batch_size": 8},
        "train": {"num_workers": 1, "global_batch_size": 4, "micro_batch_size": 2, "max_steps": 2, "precision": "fp32",
                  "checkpoint_every": 2, "validate_every": 2, "learning_rate": 1e-4},
        "evaluate": {"num_samples": 1, "num_inference_steps": 1, "batch_size": 1, "scorers": ["bright:Brightness"]},
    }  # fmt: skip
    (place / "small.yaml").write_text(yaml.safe_dump(settings))
    (place / "bright.py").write_text(
        "class Brightness:\n    name = 'brightness'\n    description = 'of all pixels'\n"
        "    def fit(self, chosen, rejected, prompts): pass\n"
        "    def score(self, images, prompts): return [1.0 for _ in images]\n"
    )
    return place


def mapo(head: RayHead, *arguments: str | Path, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """The installed command, as somebody runs it who has the token."""
    return subprocess.run(
        [BIN / "mapo", *map(str, arguments)], capture_output=True, text=True, cwd=cwd,
        env=head.environment(**changes), timeout=900, check=False,
    )  # fmt: skip


def wait_for(condition, what: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.2)


def python_job(jobs: Jobs, job_id: str, code: str, *arguments: str, metadata: dict[str, str] | None = None) -> None:
    command = shlex.join([sys.executable, "-c", code, *arguments])
    jobs.submit(job_id, command, runtime_env={}, metadata=metadata or {}, resources={})


def of_run(file: Path) -> dict[str, str]:
    config = load_config(file)
    return {"mapo_run": config.name, "mapo_storage": config.storage}


@pytest.fixture
def quiet_run(tmp_path: Path) -> Path:
    """The configuration of a run that fails at once: its source is not there."""
    settings = {
        "name": tmp_path.name.replace("_", "-")[:30],
        "storage": str(tmp_path / "storage"),
        "ingest": {"sources": [{"format": "pickapic", "path": "/nowhere/*.parquet"}]},
        "encode": {"model": "nobody/nothing"},
        "train": {"num_workers": 1, "global_batch_size": 8},
    }
    file = tmp_path / "quiet.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


# a run from beginning to end


@pytest.fixture(scope="module")
def first(head: RayHead, folder: Path) -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
    """A submitted run with its log to the end, and what a second submit was told meanwhile."""
    began = mapo(
        head, "submit", "small.yaml", "--address", head.url, "--include", "bright.py", "--env", "SETTING=plain",
        "-o", "seed=3", cwd=folder,
    )  # fmt: skip
    assert began.returncode == 0, began.stderr
    again = mapo(head, "submit", "small.yaml", "--address", head.url, "-o", "seed=3", cwd=folder)
    followed = mapo(head, "logs", "small.yaml", "--address", head.url, "--follow", cwd=folder)
    return followed, again


@pytest.mark.slow
def test_a_submitted_run_ends_well_and_its_log_says_what_ran(first, folder: Path) -> None:
    followed, _ = first
    assert followed.returncode == 0, followed.stdout + followed.stderr
    for stage in ("ingest", "encode", "train", "export", "evaluate", "report"):
        assert re.search(rf"^{stage} +\d+\.\d s ", followed.stdout, re.MULTILINE), stage
    assert f"report  {folder}/storage/runs/small/report/index.html" in followed.stdout
    assert (folder / "storage/runs/small/model/model_index.json").exists()
    assert "brightness 1.00" in followed.stdout
    assert "job mapo-small-1 succeeded" in followed.stderr


@pytest.mark.slow
def test_a_live_run_is_not_submitted_twice(first, head: RayHead) -> None:
    _, again = first
    assert again.returncode == 1
    assert re.search(rf"mapo-small-1, (PENDING|RUNNING) since \d+-\d+-\d+T.* on {head.url}", again.stderr)
    assert "hint: `mapo logs CONFIG --follow`" in again.stderr


@pytest.mark.slow
def test_a_second_submit_skips_everything(first, head: RayHead, folder: Path) -> None:
    arguments = ["--address", head.url, "--include", "bright.py", "-o", "seed=3", "--follow"]
    again = mapo(head, "submit", "small.yaml", *arguments, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("submitted mapo-small-2 ")
    for stage in ("ingest", "encode", "train", "export", "evaluate", "report"):
        assert re.search(rf"^{stage} +up to date", again.stdout, re.MULTILINE), stage


@pytest.mark.slow
def test_metadata_say_what_runs_and_hold_no_secret(first, head: RayHead, folder: Path, jobs: Jobs) -> None:
    job = jobs.find("mapo-small-1")
    assert job is not None
    assert job.state == "SUCCEEDED"
    assert job.metadata["mapo_run"] == "small"
    assert job.metadata["mapo_storage"] == f"{folder}/storage"
    assert "--include bright.py" in job.metadata["mapo_command"]
    described = jobs._client.get_job_info("mapo-small-1").model_dump_json()
    assert '"SETTING":"plain"' in described
    assert head.token not in described
    assert CANARY not in described
    assert not any(is_secret_name(name) for name in json.loads(described)["runtime_env"]["env_vars"])


@pytest.mark.slow
def test_status_shows_the_job(first, head: RayHead, folder: Path, jobs: Jobs, capsys, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    assert main(["status", "small.yaml", "-o", "seed=3", "--address", head.url, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [stage["state"] for stage in told["stages"]] == ["up to date"] * 6
    assert told["job"]["id"].startswith("mapo-small-")
    assert told["job"]["entrypoint"].startswith("mapo run small.yaml -o seed=3 -o storage=/")
    assert main(["status", "small.yaml", "--address", head.url]) == 0
    assert re.search(r"^job +\w+ +mapo-small-\d, since ", capsys.readouterr().out, re.MULTILINE)


def test_plain_ray_job_submit_refuses_a_storage_that_would_be_lost(head: RayHead, quiet_run: Path, jobs: Jobs) -> None:
    relative = "exec mapo run quiet.yaml -o storage=runs/lost"
    runtime_env = {"working_dir": str(quiet_run.parent)}
    jobs.submit("plain", relative, runtime_env=runtime_env, metadata={}, resources={})
    log: list[str] = []
    job = follow(jobs, "plain", log.append, log.append)
    assert (job.state, job.exit_code) == ("FAILED", 2)
    assert "storage runs/lost is a relative path" in "".join(log)


@pytest.mark.slow
def test_a_stopped_training_goes_on_with_the_next_submit(first, head: RayHead, folder: Path, jobs: Jobs) -> None:
    num_steps = 150
    settings = ["-o", "name=long", "-o", f"train.max_steps={num_steps}", "-o", "train.checkpoint_every=150"]
    settings += ["-o", "train.validate_every=150", "--address", head.url]
    progress = folder / "storage/runs/long/progress.json"
    assert mapo(head, "submit", "small.yaml", "--include", "bright.py", *settings, cwd=folder).returncode == 0
    wait_for(lambda: progress.exists() and json.loads(progress.read_text())["step"] > 1, "the first steps", 200)
    stopped = mapo(head, "stop", "small.yaml", *settings, cwd=folder)
    assert "mapo-long-1 is FAILED with exit code 130" in stopped.stdout, stopped.stderr
    again = mapo(head, "submit", "small.yaml", "--include", "bright.py", "--follow", *settings, cwd=folder)
    assert again.returncode == 0, again.stdout + again.stderr
    resumed = re.search(r"^train +restart 2: resuming from step (\d+)", again.stdout, re.MULTILINE)
    assert resumed is not None, again.stdout
    assert 1 < int(resumed[1]) < num_steps


# submission ids


def test_of_submits_at_the_same_moment_exactly_one_begins(quiet_run: Path, jobs: Jobs) -> None:
    num = 4
    submission = prepare(quiet_run, [], command="")
    started = threading.Barrier(num)

    def attempt(_: int) -> Job | str:
        started.wait()
        try:
            return submit(submission, jobs)
        except JobError as error:
            return error.message

    with ThreadPoolExecutor(num) as pool:
        results = list(pool.map(attempt, range(num)))
    begun = [result for result in results if isinstance(result, Job)]
    assert len(begun) == 1, results
    refused = [result for result in results if isinstance(result, str)]
    assert all(f"has a live job: {begun[0].id}" in message for message in refused)
    # a dead one resumes: it has failed, and the next id is free
    wait_for(lambda: not jobs.find(begun[0].id).is_live, "the job to fail")
    second = submit(submission, jobs)
    assert second.id == begun[0].id.removesuffix("1") + "2"


def test_another_storage_is_another_run(quiet_run: Path, jobs: Jobs, tmp_path: Path) -> None:
    one = submit(prepare(quiet_run, [], command=""), jobs)
    two = submit(prepare(quiet_run, [f"storage={tmp_path}/other"], command=""), jobs)
    assert (one.id[-2:], two.id[-2:]) == ("-1", "-2")


# logs


def test_a_log_is_whole_over_broken_connections(head: RayHead, jobs: Jobs) -> None:
    with cut_proxy(head.url) as proxy:
        behind = Jobs(proxy.url)
        python_job(jobs, "talk", TALK)
        pieces: list[str] = []
        notes: list[str] = []
        found: list[Job] = []
        thread = threading.Thread(target=lambda: found.append(follow(behind, "talk", pieces.append, notes.append)))
        thread.start()
        wait_for(lambda: "line 3 " in "".join(pieces), "the first lines")
        proxy.cut()
        wait_for(lambda: proxy.num_refused >= 2, "attempts to connect again")
        proxy.restore()
        wait_for(lambda: any("answers again" in note for note in notes), "the connection to come back")
        proxy.cut()
        wait_for(lambda: not jobs.find("talk").is_live, "the job to end")
        proxy.restore()
        thread.join(400)
    assert found[0].state == "SUCCEEDED"
    lines = [line for line in "".join(pieces).splitlines() if line.startswith("line ")]
    assert lines == [f"line {i} ö" for i in range(NUM_LINES)]
    assert "".join(pieces) == jobs.log("talk")
    assert sum("reconnecting, talk keeps running" in note for note in notes) in (1, 2)  # once for each time it was away


def test_ctrl_c_detaches_and_says_how_to_come_back(head: RayHead, jobs: Jobs, quiet_run: Path) -> None:
    python_job(jobs, "endless", "import time; print('begun', flush=True); time.sleep(600)", metadata=of_run(quiet_run))
    command = ["env", "--default-signal=INT"]  # a suite in the background of a shell ignores it, and so would this
    command += [BIN / "mapo", "logs", quiet_run, "--address", head.url, "--follow"]
    with subprocess.Popen(
        command, env=head.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as followed:
        try:
            assert any("begun" in line for line in iter(followed.stdout.readline, ""))
            followed.send_signal(2)
            _, told = followed.communicate(timeout=300)
        finally:
            followed.kill()
    assert followed.returncode == 130
    assert "detached; endless is still running" in told
    assert f"mapo stop {quiet_run} --address {head.url}" in told
    assert jobs.find("endless").state == "RUNNING"
    jobs.stop("endless")


def test_a_failed_job_is_exit_1_and_a_missing_command_is_told(
    head: RayHead, jobs: Jobs, quiet_run: Path, capsys
) -> None:
    jobs.submit("no-such", "no-such-command", runtime_env={}, metadata=of_run(quiet_run), resources={})
    assert main(["logs", str(quiet_run), "--address", head.url, "--follow"]) == 1
    told = capsys.readouterr()
    assert "job no-such failed: its command ended with exit code 127" in told.err
    assert "install `mapo` on the cluster's nodes" in told.err
    assert main(["logs", str(quiet_run), "--address", head.url, "--job", "nobody"]) == 1
    assert "has no job nobody" in capsys.readouterr().err


# stopping


def test_stop_asks_the_driver_and_waits_for_a_clean_end(head: RayHead, jobs: Jobs, quiet_run: Path, capsys) -> None:
    python_job(jobs, "clean", DRIVER, str(quiet_run), metadata=of_run(quiet_run))
    wait_for(lambda: "driving" in jobs.log("clean"), "the driver")
    assert main(["stop", str(quiet_run), "--address", head.url]) == 0
    assert "clean is FAILED with exit code 130" in capsys.readouterr().out
    assert "stopped by request of" in jobs.log("clean")
    assert main(["stop", str(quiet_run), "--address", head.url]) == 0
    assert "is not running" in capsys.readouterr().out


def test_a_job_that_does_not_answer_is_ended_by_ray(head: RayHead, jobs: Jobs, quiet_run: Path, capsys) -> None:
    python_job(jobs, "deaf", "import time; print('begun', flush=True); time.sleep(600)", metadata=of_run(quiet_run))
    wait_for(lambda: "begun" in jobs.log("deaf"), "the job")
    assert main(["stop", str(quiet_run), "--address", head.url, "--timeout", "1s"]) == 0
    assert "deaf did not stop within 1 s; Ray is ending it\nstopped   deaf is STOPPED" in capsys.readouterr().out


# what lets a client in


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RAY_AUTH_TOKEN": "wrong"}, "denies access: Authentication failed"),
        ({"RAY_AUTH_MODE": "disabled"}, "denies access: Authentication required"),
    ],
)
def test_a_wrong_or_missing_token_is_one_error(
    head: RayHead, quiet_run: Path, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    done = mapo(head, "logs", quiet_run, "--address", head.url, cwd=tmp_path, **changes)
    assert done.returncode == 1
    assert message in done.stderr
    assert "hint: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_a_token_may_lie_in_a_file(head: RayHead, quiet_run: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(head.token)
    environment = head.environment(RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    del environment["RAY_AUTH_TOKEN"]
    command = [BIN / "mapo", "logs", quiet_run, "--address", head.url]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert "has no job of run" in done.stderr


def test_the_cluster_knows_that_it_is_this_machine(jobs: Jobs) -> None:
    assert jobs.is_this_machine()


def test_a_proxy_that_is_cut_is_a_transient_error(head: RayHead, jobs: Jobs) -> None:
    with cut_proxy(head.url) as proxy:
        behind = Jobs(proxy.url)
        proxy.cut()
        with pytest.raises(ClusterError, match="does not answer") as told:
            behind.all()
    assert told.value.is_transient
    assert os.environ.get("RAY_API_SERVER_ADDRESS") is None
