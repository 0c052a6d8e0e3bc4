"""The demo: write the data set, fill in the configuration, and run it like any other."""

from collections.abc import Sequence
from pathlib import Path
from string import Template

from orchestration import api
from orchestration.config import parse_config
from orchestration.run.context import Say
from pipelines.dataset.errors import ConfigError, StorageError

CONFIG = Path(__file__).parent / "demo.yaml"


def run_demo(folder: str, overrides: Sequence[str], say: Say) -> None:
    """Run the whole demo in `folder`; a second call finds everything up to date.

    Raises:
        ConfigError: The `demo` extra is not installed.
        MapoError: The run failed, as any run can.
    """
    try:
        from orchestration.demo.base import BASE_MODEL
        from orchestration.demo.photos import write_dataset
    except ImportError as error:
        raise ConfigError(f"the demo needs the package {error.name}", "run `pip install 'mapo[demo]'`") from error
    place = Path(folder).expanduser().resolve()
    text = Template(CONFIG.read_text()).substitute(DATA=place / "source", STORAGE=place, MODEL=BASE_MODEL)
    config = parse_config(text, overrides, source="demo.yaml")
    configuration = place / "demo.yaml"
    try:
        files = write_dataset(place / "source")
        if not configuration.exists() or configuration.read_text() != text:
            configuration.write_text(text)
    except OSError as error:
        raise StorageError(f"cannot write to {place}: {error}", "give another folder: `mapo demo DIR`") from error
    say(f"photos    {len(files)} parquet files in {place / 'source'}")
    api.run(config, say=say, takes_signals=True)
