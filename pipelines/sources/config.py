"""Configuration of one preference source; formats and columns follow from the registry. Light, as all configuration."""

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
    """Kind of source."""
    path: str = Field(min_length=1)
    """File, folder or glob, local or any fsspec URL."""
    columns: dict[str, str] = Field(default_factory=dict)
    """The format's own name of a column -> what the files call it."""
    images: str | None = Field(None, min_length=1)
    """Folder, or glob of tars, that image paths are relative to; by default the folder of the file that has them."""
    split: Literal["auto", "hash", "train", "validation", "test"] = "auto"
    """The split of its rows: the source's own where it has one (auto), by prompt hash, or one for all."""
    allow_urls: bool = False
    """Follow addresses of images: http(s), or of object storage."""
    allow_private_urls: bool = False
    """Follow http(s) addresses inside private networks too."""
    url_timeout_s: float = Field(20.0, gt=0)
    """Seconds to connect, and to wait for more bytes."""
    max_image_bytes: int = Field(67_108_864, ge=1)
    """A larger image is quarantined."""

    @model_validator(mode="after")
    def columns_are_of_the_format(self) -> Self:
        """Check that `columns` names only columns of the format: a misspelt one would leave a column unread."""
        known = [field.name for field in KINDS[self.format].all_fields]
        for name in self.columns:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
                way_out = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(known)}"
                raise ValueError(f"format {self.format} has no column {name}; {way_out}")
        return self
