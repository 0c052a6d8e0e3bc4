"""One file for each kind of preference source; each turns its own rows into pairs."""

from pipelines.sources.pickapic import PickapicSource
from pipelines.sources.source import Source

SOURCES: dict[str, Source] = {source.format: source for source in (PickapicSource(),)}
"""Every kind of source by the name it has in the configuration."""
