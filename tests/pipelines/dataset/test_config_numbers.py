"""Numbers of a configuration are finite, whatever section they are in."""

import pytest

from orchestration.config import parse_config
from pipelines.dataset.errors import ConfigError

PLACES = ["evaluate.guidance_scale", "report.gpu_hour_price", "ingest.max_drop_ratio", "encode.start_timeout_s"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan"])
def test_a_number_that_is_not_finite_is_refused(place: str, number: str) -> None:
    """Guidance of inf would draw images of NaN only."""
    section, _, key = place.partition(".")
    more = "sources: [{format: pickapic, path: a}], " if section == "ingest" else ""
    with pytest.raises(ConfigError, match=rf"`{place}`: Input should be a finite number"):
        parse_config(f"name: x\nstorage: y\n{section}: {{{more}{key}: {number}}}\n")
