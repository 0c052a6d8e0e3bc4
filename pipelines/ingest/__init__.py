"""From preference sources to pair shards and rows: plan, write, commit, policy, drop budget, image check.

May import sources, units, the configuration and `pipelines.dataset`. Functions are loaded when first asked for, so that
importing a light module of this room does not load Ray Data's part.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.ingest.execution import check_drop_budget, ingest, is_up_to_date, pending_of, plan_units, write_unit

__all__ = ["check_drop_budget", "ingest", "is_up_to_date", "pending_of", "plan_units", "write_unit"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipelines.ingest import execution

    return getattr(execution, name)
