"""The embedding of "", which some trainings need: others on the same storage do not notice that it was added.

A training is pinned to versions of the tables, and another version would be another training. So those that do not ask
for the embedding of "" read the text embeddings as they were before it came, if nothing came after it.
"""

from pipelines.dataset.layout import TEXT, text_table
from pipelines.dataset.storage import Storage
from pipelines.dataset.versions import versions_after
from pipelines.encode.plan import empty_unit_id


def text_version_without_empty_prompt(storage: Storage, fingerprint: str) -> int | None:
    """Return the newest version of a text table, before the commit of the embedding of "" if that is the last.

    Args:
        storage: Of the data set.
        fingerprint: Names the table.

    Returns:
        None if there is no table.
    """
    newest = text_table(storage, fingerprint).version
    if not newest:
        return newest
    last = versions_after(storage.child(f"{TEXT}/{fingerprint}/table"), newest - 1)
    is_it = [version.units for version in last if version.number == newest] == [(empty_unit_id(fingerprint),)]
    return newest - 1 if is_it else newest
