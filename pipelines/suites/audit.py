"""Audit of judges: how often each agrees with people on held-out pairs, and which judges made the training pairs.

Needs neither samples nor models: the images are those that people compared.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.suites.results import Judge
from pipelines.suites.statistics import agreement

AUDIT_SCHEMA = pa.schema(
    [
        ("pair_key", pa.string()),
        ("prompt_id", pa.string()),
        ("scorer", pa.string()),
        ("value_0", pa.float64()),  # score of image_0; null if there is none
        ("value_1", pa.float64()),
        ("label_0", pa.float64()),  # probability that people prefer image_0
    ]
)
"""Columns of an audit, one row for each pair and scorer."""


@dataclass(frozen=True)
class JudgeAgreement:
    """Share of human pairs on which a judge agrees with the label, with its 95 % interval.

    Args:
        rate: The share, 0..1; None without a pair.
        low: End of its interval.
        high: The other end.
        n: Number of pairs that both images of have a score.
        num_prompts: Number of their prompts; the interval allows for pairs that share one.
        ceiling: Rate of the best possible judge: 1 unless labels are vote shares.
        num_left_out: Pairs with an image that has no score.
    """

    rate: float | None
    low: float | None
    high: float | None
    n: int
    num_prompts: int = 0
    ceiling: float | None = None
    num_left_out: int = 0


def audit(values: pa.Table, *, judges: Mapping[str, Judge] | None = None) -> dict[str, JudgeAgreement]:
    """Compare each judge with people.

    A pair counts where both of its images have a score. Half a credit goes to a judge that gives both the same; a human
    tie (0.5) agrees with a judge's tie, and half with anything else (see `statistics.agreement`).

    Args:
        values: Rows of AUDIT_SCHEMA.
        judges: What is known of each scorer; one that is not here prefers the higher score.

    Raises:
        ValueError: A column is missing, a pair occurs twice for a scorer, or a label is not in 0..1.
    """
    absent = [name for name in AUDIT_SCHEMA.names if name not in values.column_names]
    if absent:
        raise ValueError(f"audit: the column {absent[0]} is missing; there are {', '.join(values.column_names)}.")
    found = {}
    for scorer in sorted(values["scorer"].unique().to_pylist()):
        rows = values.filter(pc.field("scorer") == scorer)
        keys = rows["pair_key"].unique()
        if len(keys) < rows.num_rows:
            raise ValueError(f"audit: {rows.num_rows - len(keys)} of {rows.num_rows} rows of {scorer} repeat a pair.")
        sign = 1.0 if (judges or {}).get(scorer, Judge()).higher_is_better else -1.0
        found[scorer] = _agreement(rows, sign)
    return found


def _agreement(rows: pa.Table, sign: float) -> JudgeAgreement:
    first, second, labels = (
        rows[name].cast(pa.float64()).to_numpy(zero_copy_only=False) for name in ("value_0", "value_1", "label_0")
    )
    has_both = np.isfinite(first) & np.isfinite(second)
    n, left_out = int(has_both.sum()), int((~has_both).sum())
    if not n:
        return JudgeAgreement(None, None, None, n=0, num_left_out=left_out)
    prompt_ids = rows.filter(pa.array(has_both))["prompt_id"].to_pylist()
    agreed = agreement(sign * first[has_both], sign * second[has_both], labels[has_both], prompt_ids=prompt_ids)
    return JudgeAgreement(
        rate=agreed.rate,
        low=agreed.low,
        high=agreed.high,
        n=n,
        num_prompts=len(set(prompt_ids)),
        ceiling=agreed.ceiling,
        num_left_out=left_out,
    )


def circular_judges(scorers: Iterable[str], made_by: Collection[str]) -> tuple[str, ...]:
    """Return the scorers that helped to make the training pairs: a gain in their score shows that training works.

    Args:
        scorers: Names of the scorers that judge.
        made_by: Names of the scorers behind the pairs, perhaps with a fingerprint (`pickscore@…`).
    """
    makers = {each.partition("@")[0] for each in made_by}
    return tuple(each for each in dict.fromkeys(scorers) if each.partition("@")[0] in makers)
