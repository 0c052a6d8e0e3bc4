"""No command shows a secret: neither the value of a variable that holds one, nor credentials in a URL."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from factories import photo_pairs
from kept import keep_rows

from orchestration.cli import COMMANDS, main
from orchestration.commands.options import Command, note, say, say_json
from pipelines.dataset.storage import Storage

SECRET = "hunter2-hunter2"
URL = f"s3://user:{SECRET}@bucket/folder"
HERE = {
    "demo": ["demo", "{secret}/file/demo"],
    "run": ["run", "{config}"],
    "ingest": ["ingest", "{config}"],
    "encode": ["encode", "{config}", "-o", "storage={secret}/none", "-o", "encode.model={secret}"],
    "train": ["train", "{config}", "-o", "train.loss.{secret}=1"],
    "export": ["export", "{config}", "-o", "export.checkpoint={secret}"],
    "evaluate": ["evaluate", "{config}", "-o", "evaluate.scorers=[{secret}]"],
    "status": ["status", "{config}", "--json"],
    "report": ["report", "{config}"],
    "submit": ["submit", "{config}", "--address", "http://127.0.0.1:9/{secret}"],
    "logs": ["logs", "{config}", "--address", "http://127.0.0.1:9/{secret}"],
    "stop": ["stop", "{config}", "--address", "http://127.0.0.1:9/{secret}"],
    "lineage": ["lineage", "{secret}/model"],
    "data show": ["data", "show", "{secret}"],
    "data verify": ["data", "verify", "{secret}/none"],
    "data remove": ["data", "remove", "{secret}", "--where", "nothing={secret}"],
    "data compact": ["data", "compact", "{secret}/none"],
    "data gc": ["data", "gc", "{secret}", "--grace", "{secret}"],
    "data history": ["data", "history", "{secret}/none"],
    "data export": ["data", "export", "{secret}", "--parquet", "{secret}/pairs.parquet"],
    "suites show": ["suites", "show", "{secret}"],
    "suites fetch": ["suites", "fetch", "geneval", "--from", "{secret}/none"],
    "scorers show": ["scorers", "show", "{secret}"],
    "scorers fetch": ["scorers", "fetch", "aesthetic", "--from", "{secret}/none"],
    "scorers check": ["scorers", "check", "--images", "{secret}/none"],
    "scores import": ["scores", "import", "{secret}/none.jsonl", "{secret}"],
    "scores vote": ["scores", "vote", "{config}", "--models", "{secret}", "base"],
    "init": ["init", "evaluate", "{secret}/file/new.yaml"],
    "infra render": ["infra", "render", "{config}", "--target", "docker", "-o", "storage=s3://{secret}/x"],
}
"""For each command, arguments with which it shows a path or a value that holds the secret."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with a configuration, in a folder that has the secret for its name."""
    folder = tmp_path_factory.mktemp("secrets") / SECRET
    folder.mkdir()
    keep_rows(Storage(str(folder)), folder.parent / "photos.parquet", photo_pairs(4))
    (folder / "file").touch()
    (folder.parent / "run.yaml").write_text(yaml.safe_dump({
        "name": "photos",
        "storage": str(folder),
        "ingest": {"sources": [{"format": "pickapic", "path": f"{folder}/none/*.parquet"}]},
        "encode": {"model": str(folder / "model"), "resolution": 64},
        "train": {"num_workers": 1, "precision": "fp32"},
    }))  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHOTOS_API_TOKEN", SECRET)


def test_every_command_has_a_case() -> None:
    assert set(HERE) == {command.name for command in COMMANDS}


@pytest.mark.parametrize("name", HERE)
def test_a_command_masks_the_value_of_a_secret_variable(name: str, folder: Path, capfd) -> None:
    main([each.format(secret=folder, config=folder.parent / "run.yaml") for each in HERE[name]])
    shown = "".join(capfd.readouterr())
    assert SECRET not in shown
    assert "***" in shown


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_command_masks_credentials_in_a_url_that_it_refuses(
    command: Command, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PHOTOS_API_TOKEN")
    with pytest.raises(SystemExit) as left:
        main([*command.name.split(), URL, URL, *(["--where", "x"] if command.name == "data remove" else [])])
    shown = "".join(capfd.readouterr())
    assert left.value.code == 2
    assert SECRET not in shown


@pytest.mark.parametrize("name", ["status", "ingest"])
def test_a_traceback_is_masked(name: str, folder: Path, capfd) -> None:
    main([name, str(folder / "none.yaml"), "--debug"])
    shown = "".join(capfd.readouterr())
    assert "Traceback" in shown
    assert SECRET not in shown


@pytest.mark.parametrize("secret", ['quote"quote"quote', "back\\slash\\back", "two\nlines of it", "gehëim-gehëim"])
def test_a_secret_is_found_in_json_too(secret: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHOTOS_API_TOKEN", secret)
    for show in (say, note):
        show(f"it is {secret}")
    say_json({"token": secret})
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == err.rstrip() == "it is ***"
    assert json.loads("".join(out.splitlines()[1:])) == {"token": "***"}


def test_a_warning_on_stderr_masks_secrets(folder: Path) -> None:
    code = (
        "import logging; from orchestration.cli import main; main(['status', 'none.yaml'])\n"
        f"logging.getLogger('orchestration').warning('%s not written', '{folder}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert "*** not written" in done.stderr
    assert SECRET not in done.stderr
