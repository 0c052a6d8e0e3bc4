"""The accounting of a data set in words: what was read and kept, of which kinds."""

from collections.abc import Mapping

from pipelines.dataset.pair import JUDGED, PAIR, PRIOR, Status
from pipelines.maintenance.describe import DatasetFacts


def summary_line(facts: DatasetFacts) -> str:
    """Return the accounting in one line; its parts add up to the rows read."""
    parts = ", ".join(f"{facts.rows[str(status)]:,} {status}" for status in Status)
    kinds = kinds_line(facts.kinds, facts.verdicts)
    return f"{sum(facts.rows.values()):,} rows: {parts}" + (f"; kept {kinds}" if kinds else "")


def kinds_line(kinds: Mapping[str, int], verdicts: Mapping[str, int]) -> str:
    """Return the kept rows by kind, such as `1,204 pairs, 530 judged (410 good, 120 bad)`; "" if all are pairs.

    Args:
        kinds: Kept rows by kind.
        verdicts: Kept judged images: good and bad.
    """
    if not kinds[JUDGED] and not kinds[PRIOR]:
        return ""
    told = ", ".join(f"{count:,} {verdict}" for verdict, count in verdicts.items())
    parts = {
        f"{kinds[PAIR]:,} pairs": kinds[PAIR],
        f"{kinds[JUDGED]:,} judged ({told})": kinds[JUDGED],
        f"{kinds[PRIOR]:,} prior": kinds[PRIOR],
    }
    return ", ".join(text for text, count in parts.items() if count)


def as_text(facts: DatasetFacts) -> str:
    """Return the facts for a terminal."""
    lines = [
        f"{facts.storage} · version {facts.version}",
        summary_line(facts),
        f"{len(facts.shards)} shards, {facts.bytes:,} bytes, {facts.prompts:,} prompts, "
        + ", ".join(f"{count:,} {split}" for split, count in facts.splits.items()),
    ]
    lines += [f"  {count:>9,}  {reason}" for reason, count in facts.reasons.items()]
    for kind, encoded in (("latents", facts.latents), ("text", facts.text)):
        lines += [
            f"{kind} {made.fingerprint}: {made.shown}, {made.shards} shards, {made.bytes:,} bytes" for made in encoded
        ]
    return "\n".join(lines)
