"""One file for each kind of preference source; each turns its own rows into pairs."""

from pipelines.sources.hpd import HpdSource
from pipelines.sources.imagereward import ImagerewardSource
from pipelines.sources.pairs import JsonlSource, PairsSource
from pipelines.sources.pickapic import PickapicSource
from pipelines.sources.rapidata import RapidataSource
from pipelines.sources.table_source import TableSource
from pipelines.sources.webdataset import WebdatasetSource

SOURCES: dict[str, TableSource] = {
    source.format: source
    for source in (
        PickapicSource(),
        WebdatasetSource(),
        HpdSource(),
        ImagerewardSource(),
        RapidataSource(),
        PairsSource(),
        JsonlSource(),
    )
}
"""Every kind of source by the name it has in the configuration."""
