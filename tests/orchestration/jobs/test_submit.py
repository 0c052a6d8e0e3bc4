"""`mapo submit` before anything is sent: paths, ids, settings, sizes, addresses; and a job's own view of its paths."""

import json
import os
import shlex
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from orchestration.cli import main, parser
from orchestration.commands.submit import parse_settings
from orchestration.config import RunConfig, load_config, parse_config
from orchestration.jobs import client as dashboard
from orchestration.jobs.api import Job, Jobs
from orchestration.jobs.bundle import MAX_SENT_BYTES, bundled
from orchestration.jobs.client import resolve_address
from orchestration.jobs.paths import (
    absolute_overrides,
    check_inside_job,
    load_located,
    shared_paths,
    yaml_text,
)
from orchestration.jobs.submit import jobs_of, next_id, prepare
from orchestration.run.job_id import JOB_VARIABLE, submission_id
from pipelines.dataset.errors import ClusterError, ConfigError

RUN = {
    "name": "photos",
    "storage": "runs/photos",
    "ingest": {"sources": [{"format": "pickapic", "path": "data/*.parquet"}]},
    "encode": {"model": "stabilityai/stable-diffusion-xl-base-1.0"},
    "train": {"num_workers": 1, "global_batch_size": 8},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a configuration."""
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", JOB_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "photos.yaml").write_text(yaml.safe_dump(RUN))
    return tmp_path


def config(**changes: object) -> RunConfig:
    return parse_config(yaml.safe_dump(RUN | changes))


# paths


def test_relative_paths_become_absolute_and_nothing_else_changes(here: Path) -> None:
    submission = prepare("photos.yaml", ["seed=7"], command="mapo submit photos.yaml")
    assert submission.entrypoint == (
        f"mapo run photos.yaml -o seed=7 -o storage={here}/runs/photos "
        f"-o {shlex.quote(f'ingest.sources.0.path={here}/data/*.parquet')}"
    )
    assert submission.config == config(
        seed=7,
        storage=f"{here}/runs/photos",
        ingest={"sources": [{"format": "pickapic", "path": f"{here}/data/*.parquet"}]},
    )


def test_the_command_of_a_job_is_read_as_it_was_meant(here: Path) -> None:
    folder = here / "it's: a #place, {x} & $y"
    folder.mkdir()
    os.chdir(folder)
    (folder / "-o.yaml").write_text(yaml.safe_dump(RUN))
    submission = prepare("./-o.yaml", ["ingest.sources.0.path=~/a b.parquet"], command="")
    words = shlex.split(submission.entrypoint)
    options = parser().parse_args(words[1:])
    os.chdir("/")
    assert load_config(folder / options.config, options.overrides) == submission.config
    assert submission.config.storage == f"{folder}/runs/photos"
    assert submission.config.ingest is not None
    assert submission.config.ingest.sources[0].path == str(Path("~/a b.parquet").expanduser())


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30).map(lambda name: f"/{name}"))
def test_a_path_survives_the_command_line_and_yaml(path: str) -> None:
    (word,) = shlex.split(shlex.quote(f"storage={yaml_text(path)}"))
    assert parse_config(yaml.safe_dump(RUN), [word]).storage == path


@pytest.mark.parametrize("place", ["s3://bucket/photos", "gs://b/x", "memory://x"])
def test_urls_and_hub_ids_stay(here: Path, place: str) -> None:
    far = config(storage=place, ingest={"sources": [{"format": "pickapic", "path": f"{place}/*.parquet"}]})
    assert absolute_overrides(far) == []
    assert shared_paths(far) == {}


def test_a_model_is_a_folder_where_there_is_one_of_its_name(here: Path) -> None:
    (here / "models" / "sdxl").mkdir(parents=True)
    found = absolute_overrides(config(storage="/s", ingest=None, encode={"model": "models/sdxl", "vae": "models/vae"}))
    assert found == [f"encode.model={here}/models/sdxl"]
    found = absolute_overrides(config(storage="/s", ingest=None, encode={"model": "./models/none"}))
    assert found == [f"encode.model={here}/models/none"]


def test_folders_of_each_node_are_made_absolute_but_need_not_be_shared(here: Path) -> None:
    cached = config(storage="/s", ingest=None, train=RUN["train"] | {"cache_dir": "cache"})
    assert absolute_overrides(cached) == [f"train.cache_dir={here}/cache"]
    assert shared_paths(cached) == {"storage": "/s"}


def test_a_link_stays_as_it_is_written(here: Path) -> None:
    (here / "disk").mkdir()
    (here / "data").symlink_to(here / "disk")
    assert f"ingest.sources.0.path={here}/data/*.parquet" in absolute_overrides(config())


def test_a_run_is_the_same_one_in_every_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = load_located("photos.yaml", [])
    sent = prepare("photos.yaml", [], command="")
    monkeypatch.chdir("/")
    assert load_located(here / "photos.yaml", sent.overrides)[0] == sent.config == one


# inside a job


def test_a_relative_storage_is_refused_inside_a_job(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_inside_job(config(), print)
    monkeypatch.setenv(JOB_VARIABLE, json.dumps({"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_x"}}))
    with pytest.raises(ConfigError, match=f"storage runs/photos is a relative path.*{here}"):
        check_inside_job(config(), print)
    assert submission_id() == "raysubmit_x"


def test_relative_sources_inside_a_job_are_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    said: list[str] = []
    check_inside_job(config(storage="s3://b/x"), said.append)
    assert len(said) == 1
    assert "ingest.sources.0.path data/*.parquet" in said[0]
    check_inside_job(config(storage=f"{here}/s", ingest=None), said.append)
    assert len(said) == 1
    assert submission_id() is None


# ids


def test_an_id_is_one_more_than_those_of_the_same_name() -> None:
    taken = ["mapo-photos-2", "mapo-photos-10", "mapo-photos-b-77", "raysubmit_x", "mapo-photos-", "mapo-photosX-30"]
    assert next_id("photos", taken) == "mapo-photos-11"
    assert next_id("photos-b", taken) == "mapo-photos-b-78"
    assert next_id("p.otos", taken) == "mapo-p.otos-1"


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "a-1", "a.1", "A", "1"]), max_size=12))
def test_no_id_is_given_twice(names: list[str]) -> None:
    taken: list[str] = []
    for name in names:
        taken.append(next_id(name, taken))
    assert len(set(taken)) == len(taken)


def test_a_job_is_of_a_run_by_name_and_storage(here: Path) -> None:
    def job(number: int, run: str, storage: str) -> Job:
        return Job(
            f"mapo-{run}-{number}", "RUNNING", None, None, "", "", None, {"mapo_run": run, "mapo_storage": storage}
        )

    jobs = [job(1, "photos", "/other"), job(2, "photos", f"{here}/runs/photos"), job(1, "b", f"{here}/runs/photos")]
    assert jobs_of(config(), jobs) == [jobs[1]]


# what is sent


def test_the_configuration_and_what_is_included_are_all_that_is_sent(here: Path) -> None:
    (here / "secret.txt").write_text("not for anyone")
    (here / "scorers" / "__pycache__").mkdir(parents=True)
    for name in ("colour.py", ".gitignore", "__pycache__/colour.pyc", ".git/config"):
        (here / "scorers" / name).parent.mkdir(exist_ok=True)
        (here / "scorers" / name).write_text("*.py")
    (here / "sharp.py").write_text("")
    submission = prepare("photos.yaml", ["seed=1"], command="", included=["scorers", "./sharp.py"])
    with bundled(submission.file, submission.included) as folder:
        sent = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        assert (folder / "photos.yaml").read_bytes() == (here / "photos.yaml").read_bytes()
    assert sent == ["photos.yaml", "scorers/colour.py", "sharp.py"]
    assert not folder.exists()


def test_prompts_and_scorers_that_the_configuration_names_are_sent_too(here: Path) -> None:
    (here / "texts").mkdir()
    (here / "texts" / "prompts.csv").write_text("text\na red house\n")
    (here / "bright.py").write_text("")
    (here / "orchestration").mkdir()
    scorers = ["bright:Brightness", "orchestration.demo.scores:StyleScore", "pickscore", "json:Decoder"]
    evaluate = {"prompts": {"path": "texts/prompts.csv", "column": "text"}, "scorers": scorers}
    (here / "photos.yaml").write_text(yaml.safe_dump(RUN | {"evaluate": evaluate}))
    submission = prepare("photos.yaml", [], command="", included=["./bright.py"])
    with bundled(submission.file, submission.included) as folder:
        assert sorted(each.name for each in folder.iterdir()) == ["bright.py", "photos.yaml", "prompts.csv"]
        of_job = parse_config((folder / "photos.yaml").read_text(), submission.overrides)
    assert of_job.evaluate.prompts is not None
    assert (of_job.evaluate.prompts.path, of_job.evaluate.prompts.column) == ("prompts.csv", "text")


def test_small_adapters_travel_and_large_ones_are_found_by_their_path(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "mine").mkdir()
    file = here / "mine" / "pytorch_lora_weights.safetensors"
    save_file({"unet.x.lora_A.weight": np.zeros((4, 8), np.float32)}, file)
    train = {**(RUN.get("train") or {}), "lora": {"rank": 4, "weights": "mine"}}
    (here / "photos.yaml").write_text(yaml.safe_dump(RUN | {"train": train}))
    submission = prepare("photos.yaml", [], command="")
    assert [path.name for path in submission.included] == [file.name]
    assert "train.lora.weights" not in shared_paths(submission.config)
    of_job = parse_config((here / "photos.yaml").read_text(), submission.overrides)
    assert of_job.train is not None
    assert of_job.train.lora is not None
    assert of_job.train.lora.weights == file.name
    monkeypatch.setattr("orchestration.jobs.named_files.MAX_ADAPTER_BYTES", file.stat().st_size - 1)
    submission = prepare("photos.yaml", [], command="")
    assert submission.included == ()
    assert shared_paths(submission.config)["train.lora.weights"] == str(file.parent)
    assert parse_config((here / "photos.yaml").read_text(), submission.overrides) == submission.config
    for place in ("me/adapters", "me/adapters/mine.safetensors", "s3://bucket/mine.safetensors"):
        (here / "photos.yaml").write_text(
            yaml.safe_dump(RUN | {"train": {**train, "lora": {"rank": 4, "weights": place}}})
        )
        assert not [each for each in prepare("photos.yaml", [], command="").overrides if "weights" in each]


def test_prompts_that_are_not_there_are_found_before_anything_is_sent(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.prompts: there is no file .*none\.txt"):
        prepare("photos.yaml", ["evaluate.prompts=none.txt"], command="")


def test_too_much_to_send_is_refused_before_it_is_copied(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "big.bin").touch()
    os.truncate(here / "big.bin", MAX_SENT_BYTES)  # takes no space
    with pytest.raises(ConfigError, match=r"2 files of 67,\d+,\d+ bytes.*67,108,864\); the largest is big.bin"):
        prepare("photos.yaml", [], command="", included=["big.bin"])


@pytest.mark.parametrize(
    ("included", "message"),
    [(["none.py"], "no such file"), (["a/x.py", "b/x.py"], "a/x.py is already sent as x.py"),
     (["a/photos.yaml"], "photos.yaml is already sent as")],
)  # fmt: skip
def test_what_cannot_be_included_is_named(here: Path, included: list[str], message: str) -> None:
    for name in ("a/x.py", "b/x.py", "a/photos.yaml"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).touch()
    with pytest.raises(ConfigError, match=message):
        prepare("photos.yaml", [], command="", included=included)


@pytest.mark.parametrize(
    ("name", "value"),
    [("HF_TOKEN", "x"), ("AWS_SECRET_ACCESS_KEY", "x"), ("WANDB_API_KEY", "x"), ("RAY_AUTH_TOKEN", "x"),
     ("HTTP_PROXY", "http://me:canary@proxy"), ("FSSPEC_S3", '{"client_kwargs": [{"secret": "canary"}]}'),
     ("HARMLESS", "the canary of the environment")],
)  # fmt: skip
def test_secrets_are_not_sent(here: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv("SOME_PASSWORD", "canary of the environment")
    with pytest.raises(ConfigError, match=f"--env {name} looks like a secret") as refused:
        prepare("photos.yaml", [], command="", environment={name: value})
    assert "canary" not in str(refused.value)


def test_plain_settings_are_sent(here: Path) -> None:
    given = parse_settings(["NCCL_SOCKET_IFNAME=eth0", "RAY_AUTH_TOKEN_PATH=/run/token", "X=a=b", "EMPTY="])
    given |= {"FSSPEC_S3": '{"config_kwargs": {"read_timeout": 60}}'}
    environment = prepare("photos.yaml", [], command="", environment=given).environment
    assert environment == given | {"RAY_JOB_STOP_WAIT_TIME_S": "300"}
    with pytest.raises(ConfigError, match="--env : not NAME=VALUE"):
        parse_settings(["=x"])


def test_metadata_say_what_runs(here: Path) -> None:
    one, two = (prepare("photos.yaml", [seed], command="mapo submit x").metadata() for seed in ("seed=1", "seed=2"))
    assert one["mapo_run"] == "photos"
    assert one["mapo_storage"] == f"{here}/runs/photos"
    assert one["mapo_command"] == "mapo submit x"
    assert one["mapo_config"] != two["mapo_config"]
    assert one["mapo_submission"] != two["mapo_submission"]


# the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "train.num_worker=2"], "did you mean `train.num_workers`?"),
        (["-o", "train=null", "-o", "ingest=null"], "has no `ingest`, `train`"),
        (["--env", "HF_TOKEN=x"], "looks like a secret"),
        (["--entrypoint-resources", "[1]"], "not a JSON object of names and numbers"),
        (["--entrypoint-num-cpus", "-1"], "must not be negative"),
        (["--address", "ray://head:10001"], "http://HOST:8265"),
        (["--address", "http://me:canary@head:8265"], "credentials in the address"),
    ],
)
def test_what_is_wrong_is_found_without_a_cluster(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["submit", "photos.yaml", "--address", "http://127.0.0.1:9", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "canary" not in told


@pytest.mark.parametrize("command", ["submit", "logs"])
def test_without_an_address_there_is_a_hint(here: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, "photos.yaml"]) == 2
    assert "hint: give `--address http://HOST:8265`" in capsys.readouterr().err


def test_the_address_given_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert resolve_address("http://a:1/") == "http://a:1"
    assert resolve_address("a:1") == "http://a:1"
    assert resolve_address(None) == "http://10.0.0.1:6379"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://b")
    assert resolve_address(None) == "https://b"


@pytest.mark.parametrize("headers", ["x", "[]", '{"a": 1}'])
def test_headers_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch, headers: str) -> None:
    monkeypatch.setenv("RAY_JOB_HEADERS", headers)
    with pytest.raises(ConfigError, match="RAY_JOB_HEADERS is not a JSON object"):
        Jobs("http://127.0.0.1:9")


# a cluster that is not there


def test_nobody_at_the_address_is_told_at_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        with pytest.raises(ClusterError, match=r"does not answer: Connection refused") as told:
            Jobs(f"http://127.0.0.1:{probe.getsockname()[1]}")
    assert told.value.is_transient


@pytest.mark.parametrize("takes_connections", [True, False])
def test_silence_has_a_deadline(monkeypatch: pytest.MonkeyPatch, takes_connections: bool) -> None:
    monkeypatch.setattr(dashboard, "CONNECT_TIMEOUT_S", 0.5)
    monkeypatch.setattr(dashboard, "ANSWER_TIMEOUT_S", 0.5)
    with socket.socket() as silent, socket.socket() as first:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8 if takes_connections else 0)
        if not takes_connections:
            first.connect(silent.getsockname())  # the queue is full: the kernel drops the next one's packets
        started = time.monotonic()
        with pytest.raises(ClusterError, match=r"does not answer: .*timed out"):
            Jobs(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - started < 5


def test_another_server_is_not_taken_for_ray() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ClusterError, match="does not answer like a Ray dashboard"):
            Jobs(f"http://127.0.0.1:{server.getsockname()[1]}")
        server.shutdown(socket.SHUT_RDWR)
