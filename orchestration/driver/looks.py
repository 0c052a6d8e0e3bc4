"""The looks at a run's stages: one per stage, kept until its work is done or another driver has changed the run."""

from orchestration.run.context import Run
from orchestration.stages.registry import Stage
from orchestration.stages.stage import Look


class Looks:
    """The looks of one command: the work shown in the plan is the work that is executed and recorded.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._known: dict[str, Look] = {}
        self._num_events = run.journal.num_events

    def at(self, stage: Stage) -> Look:
        """Return the look at a stage, which the first call takes."""
        if stage.name not in self._known:
            self._known[stage.name] = stage.look(self._run)
        return self._known[stage.name]

    def forget_if_changed(self, *, num_own_events: int) -> None:
        """Look again at every stage if another driver has written to the journal since the first look.

        Args:
            num_own_events: Number of events that this driver has written.
        """
        if self._run.journal.num_events > self._num_events + num_own_events:
            self._known.clear()
