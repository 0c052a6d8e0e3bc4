"""The embedding of "", which some trainings need; adding it does not affect other trainings on the same storage.

A training is pinned to versions of the tables, and another version would be another training. So trainings that do not
need the embedding of "" read the version before it was added, if nothing was added after it.
"""

from pipelines.dataset.layout import TEXT, text_table
from pipelines.dataset.storage import Storage
from pipelines.dataset.versions import versions_after
from pipelines.encode.plan import empty_unit_id


def text_version_without_empty_prompt(storage: Storage, fingerprint: str) -> int | None:
    """Return the newest version of a text table, or the one before it if the newest only added the embedding of "".

    Args:
        storage: The data set's storage.
        fingerprint: The table's fingerprint.

    Returns:
        The version; None if there is no table.
    """
    newest = text_table(storage, fingerprint).version
    if not newest:
        return newest
    last = versions_after(storage.child(f"{TEXT}/{fingerprint}/table"), newest - 1)
    is_it = [version.units for version in last if version.number == newest] == [(empty_unit_id(fingerprint),)]
    return newest - 1 if is_it else newest
