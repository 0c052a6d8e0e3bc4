"""Every kind of preference source, by its name in the configuration: the only list of them."""

from pipelines.sources.hpd import HpdSource
from pipelines.sources.imagereward import ImagerewardSource
from pipelines.sources.judged import JudgedSource
from pipelines.sources.kind import SourceKind
from pipelines.sources.pairs import JsonlSource, PairsSource
from pipelines.sources.pickapic import PickapicSource
from pipelines.sources.rapidata import RapidataSource
from pipelines.sources.webdataset import WebdatasetSource

KINDS: dict[str, SourceKind] = {
    kind.format: kind
    for kind in (
        PickapicSource(),
        WebdatasetSource(),
        HpdSource(),
        ImagerewardSource(),
        RapidataSource(),
        PairsSource(),
        JsonlSource(),
        JudgedSource(),
    )
}
