"""Names for plain values whose shape a file or a table decides."""

from typing import Any

JsonObject = dict[str, Any]
"""A parsed JSON object."""
Row = dict[str, Any]
"""A table row: column -> value."""
