"""Prompt leaks: prompts of a suite that a model was trained on, by `prompt_id`."""

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.layout import pairs_table
from pipelines.dataset.pair import TRAIN, Status
from pipelines.dataset.storage import Storage
from pipelines.suites.suite import Suite


def leaked_prompts(storage: Storage, version: int, suites: Iterable[Suite]) -> dict[str, int]:
    """Count the prompts of each suite that kept pairs or single images for training have, by the suite's name.

    The table is read once for all suites, a batch at a time. Only equal texts count: a prompt that was reworded, or
    differs by a space, is another prompt.

    Args:
        storage: The storage of the data set.
        version: Version of the table of pairs that was trained on.
        suites: The suites, as they are drawn.

    Raises:
        SnapshotError: The table has no such version.
    """
    prompts = {suite.name: [each.sample_id for each in suite.prompts] for suite in suites}
    wanted = pa.array(sorted(set().union(*prompts.values())), pa.string())
    is_trained_on = (pc.field("status") == str(Status.KEPT)) & (pc.field("split") == TRAIN)
    found: set[str] = set()
    table = pairs_table(storage, version)
    for batch in table.batches(["prompt_id"], is_trained_on & pc.field("prompt_id").isin(wanted)):
        found.update(pc.unique(batch["prompt_id"]).to_pylist())
    return {name: sum(each in found for each in prompt_ids) for name, prompt_ids in prompts.items()}
