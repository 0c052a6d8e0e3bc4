"""Configuration of one preference source; formats and columns come from the registry. Light, like all configuration."""

import difflib
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from pipelines.dataset.config import Config
from pipelines.sources.registry import KINDS

if TYPE_CHECKING:
    SourceFormat = str
else:
    SourceFormat = Literal[tuple(KINDS)]


class SourceConfig(Config):
    """One preference source."""

    format: SourceFormat
    """The kind of source."""
    path: str = Field(min_length=1)
    """File, folder or glob: a local path or any fsspec URL."""
    columns: dict[str, str] = Field(default_factory=dict)
    """The format's name of a column -> its name in the files."""
    images: str | None = Field(None, min_length=1)
    """Folder, or glob of tars, that image paths are relative to; by default the folder of the source file."""
    split: Literal["auto", "hash", "train", "validation", "test"] = "auto"
    """The split of its rows: the source's own if it has one (auto), by prompt hash (hash), or the same for all rows."""
    allow_urls: bool = False
    """Fetch images by URL: http(s) or object storage."""
    allow_private_urls: bool = False
    """Also fetch http(s) URLs inside private networks."""
    url_timeout_s: float = Field(20.0, gt=0)
    """Timeout for connecting, and for each wait for more bytes, in seconds."""
    max_image_bytes: int = Field(67_108_864, ge=1)
    """Quarantine images larger than this."""

    @model_validator(mode="after")
    def columns_are_of_the_format(self) -> Self:
        """Check that `columns` names only columns of the format: a column under a misspelt name would not be read."""
        known = [field.name for field in KINDS[self.format].all_fields]
        for name in self.columns:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
                way_out = f"did you mean `{near[0]}`?" if near else f"its columns are {', '.join(known)}"
                raise ValueError(f"format {self.format} has no column {name}; {way_out}")
        return self
