"""The work of the stage `evaluate`: draw what is missing, score what is missing, reduce, and choose what to show."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import pyarrow as pa

from orchestration.run.context import EVALUATION, RESULTS
from orchestration.stages.evaluation_cost import cost_line, gpu_hours
from orchestration.stages.evaluation_images import images_of, samples_of
from orchestration.stages.evaluation_scores import EvaluationScores
from orchestration.stages.held_out import HeldOutPairs
from orchestration.stages.judged_models import (
    JudgedModel,
    check_against,
    is_here,
    judged_models,
    remove_unets,
    write_unets,
)
from orchestration.stages.judged_scorers import judges_of
from orchestration.stages.judged_suites import judged_suites, names_of_suites
from orchestration.stages.judged_votes import shown_votes, wants_votes
from orchestration.stages.missing_judges import absent_judges, has_imported, planned, remarks
from pipelines.resources import uses_gpu
from pipelines.samples.drawing import Drawing, Sampling
from pipelines.samples.execution import draw, read_samples
from pipelines.samples.fingerprint import samples_fingerprint
from pipelines.samples.plan import count_missing, distinct_samples, unit_size
from pipelines.suites.evaluation import EvaluationCost, EvaluationRecord, warnings_of
from pipelines.suites.gallery import GalleryEntry, choose_gallery, step_of
from pipelines.suites.reduce import reduce_suite
from pipelines.suites.results import Judge as ShownJudge
from pipelines.suites.results import Results, SuiteResult
from pipelines.suites.suite import Suite
from pipelines.units.workers import Workers

if TYPE_CHECKING:
    from orchestration.run.context import Run
    from orchestration.run.journal import StageRecord
    from pipelines.samples.account import Drawn
    from pipelines.suites.results import MissingJudge


@dataclass(frozen=True)
class Cell:
    """The samples of one model for one suite."""

    suite: Suite
    model: JudgedModel
    drawing: Drawing


class Evaluation:
    """One evaluation of a run: its suites, models and samples, as the storage is now.

    Args:
        run: The run.
        trained: The record of the training whose model is judged; None without one.
        exported: The record of its export.
        version: Version of the table of pairs; None if there is none.
    """

    def __init__(
        self, run: Run, trained: StageRecord | None, exported: StageRecord | None, version: int | None
    ) -> None:
        self._run, self._trained, self._exported = run, trained, exported
        self.held_out = HeldOutPairs(run.storage, version)
        self.storage, self.say, self.max_audit_pairs = run.storage, run.say, run.config.evaluate.max_audit_pairs

    @cached_property
    def suites(self) -> list[Suite]:
        """The suites, as they are drawn."""
        return judged_suites(self._run.config, self.held_out)

    @cached_property
    def models(self) -> list[JudgedModel]:
        """The models, in the order of the configuration.

        Raises:
            ConfigError: The model to compare with is not among them.
        """
        found = judged_models(self._run, self._trained, self._exported)
        check_against(self._run.config.evaluate.against, [model.name for model in found])
        return found

    @cached_property
    def cells(self) -> list[Cell]:
        """The samples of each model for each suite; all suites of a model follow each other."""
        return [self.cell(suite, model) for model in self.models for suite in self.suites]

    def cell(self, suite: Suite, model: JudgedModel) -> Cell:
        """Return the samples of one model for one suite."""
        config = self._run.config
        assert config.encode is not None
        side = suite.resolution or config.encode.resolution
        sampling = Sampling(suite.num_inference_steps, suite.guidance_scale, side, side, dtype=self._dtype)
        fingerprint = samples_fingerprint(model.drawn, sampling)
        wanted = samples_of(suite, fingerprint, config.seed)
        return Cell(suite, model, Drawing(model.drawn, sampling, fingerprint, wanted))

    @cached_property
    def _dtype(self) -> str:
        config = self._run.config
        assert config.encode is not None
        if config.evaluate.dtype != "auto":
            return config.evaluate.dtype
        return "float16" if self.on_gpu else "float32"

    @property
    def is_sampling_known(self) -> bool:
        """Whether the samples' fingerprints are known without a cluster, which `auto` asks for its GPUs."""
        config = self._run.config
        is_explicit = config.encode is not None and (config.evaluate.dtype != "auto" or config.encode.device != "auto")
        return is_explicit and all(is_here(model) for model in config.evaluate.models)

    @cached_property
    def on_gpu(self) -> bool:
        """Whether samplers run on GPUs."""
        assert self._run.config.encode is not None
        return uses_gpu(self._run.config.encode.device)

    @property
    def workers(self) -> Workers:
        """The workers that draw and score."""
        evaluate, encode = self._run.config.evaluate, self._run.config.encode
        assert encode is not None
        return Workers(
            "evaluate", evaluate.batch_size, evaluate.num_workers, encode.device, encode.resources,
            encode.start_timeout_s,
        )  # fmt: skip

    def run(self) -> EvaluationRecord:
        """Draw and score what is missing, write `results.json` and the gallery, and return the record of the stage."""
        started = time.monotonic()
        judges = judges_of(self._run, self.suites, self.held_out)  # before an image is drawn
        assert self.cells, "there is always a suite and a model"
        self._run.storage.delete(f"{self._folder}/{RESULTS}")  # of samples that may be others now
        absent = {suite.name: absent_judges(self._run, suite) for suite in self.suites}
        drawn = self._draw()
        scored = EvaluationScores(self, judges, absent)
        for line in remarks([(suite, scored.missing[suite.name]) for suite in self.suites]):
            self.say(f"evaluate  {line}")
        shown = scored.shown
        results, gallery = self._reduce(scored, shown)
        agreed = scored.audit(shown)
        self._write(results, gallery, scored)
        cost = self._cost(drawn, time.monotonic() - started)
        judges_shown = shown | shown_votes(self._run.config)
        return EvaluationRecord(results, gallery, agreed, judges_shown, warnings_of(results, shown), cost)

    @property
    def _folder(self) -> str:
        return f"{self._run.folder}/{EVALUATION}"

    def _draw(self) -> list[Drawn]:
        """Draw the missing samples; the UNets of checkpoints are on the storage only meanwhile."""
        run, missing = self._run, self.missing
        run.say(self._plan_line())
        waiting = {cell.model.name: cell.model for cell in self.cells if missing[cell.drawing.fingerprint]}
        try:
            if any(model.checkpoint for model in waiting.values()):
                assert self._trained is not None
                write_unets(run, self._trained, list(waiting.values()))
            return draw(run.storage, [cell.drawing for cell in self.cells], self.workers, run.say)
        finally:
            remove_unets(run)

    @cached_property
    def _drawings(self) -> dict[str, Drawing]:
        """All samples of each model and settings, by their fingerprint; suites may share some."""
        merged = {cell.drawing.fingerprint: cell.drawing for cell in self.cells}
        for fingerprint, drawing in merged.items():
            tables = [cell.drawing.wanted for cell in self.cells if cell.drawing.fingerprint == fingerprint]
            merged[fingerprint] = replace(drawing, wanted=distinct_samples(*tables))
        return merged

    @cached_property
    def missing(self) -> dict[str, int]:
        """Number of samples to draw, by the fingerprint of model and settings."""
        return {name: count_missing(self._run.storage, drawing) for name, drawing in self._drawings.items()}

    def _plan_line(self) -> str:
        """Say how much is drawn, and what it may cost."""
        total = sum(drawing.wanted.num_rows for drawing in self._drawings.values())
        missing = sum(self.missing.values())
        line = f"evaluate  {total:,} samples of {', '.join(model.name for model in self.models)}: {missing:,} to draw"
        if missing and self.on_gpu:
            line += f", about {gpu_hours(self._drawings, self.missing):.2g} GPU hours on an H200"
        return line

    def remarks(self) -> tuple[str, ...]:
        """Say how many units are missing, what drawing them would take of an H200, and which judges have no scores."""
        missing, told = self.missing, remarks([(suite, self._without_scores(suite)) for suite in self.suites])
        if not any(missing.values()):
            return told
        size = unit_size(self._run.config.evaluate.batch_size)
        cost = cost_line(sum(-(-each // size) for each in missing.values()), gpu_hours(self._drawings, missing))
        return (cost, *told)

    def _without_scores(self, suite: Suite) -> list[MissingJudge]:
        """Return the judges that will have no numbers of a suite, as the storage is now."""
        drawings = [cell.drawing for cell in self.cells if cell.suite is suite]
        is_open = not has_imported(self._run, suite) or any(count_missing(self.storage, each) for each in drawings)
        if is_open:
            return planned(self._run, suite, None)
        samples = [images_of(read_samples(self.storage, drawing), [], suite) for drawing in drawings]
        return planned(self._run, suite, pa.concat_tables(samples))

    def _cost(self, drawn: Sequence[Drawn], seconds: float) -> EvaluationCost:
        gpu_hours = sum(each.worker_s for each in drawn) / 3600 if self.on_gpu else None
        return EvaluationCost(sum(each.num_drawn for each in drawn), gpu_hours, seconds)

    def _reduce(
        self, scored: EvaluationScores, shown: Mapping[str, ShownJudge]
    ) -> tuple[Results, tuple[GalleryEntry, ...]]:
        config = self._run.config
        against, names = config.evaluate.against, [model.name for model in self.models]
        in_gallery = [name for name in names if step_of(name) is None]
        in_gallery = sorted(in_gallery if len(in_gallery) > 1 else names, key=lambda name: name != against)
        results: dict[str, SuiteResult] = {}
        gallery: list[GalleryEntry] = []
        leaked = {} if self._trained is None else self.held_out.leaked(self.suites)
        for name, drawn in zip(names_of_suites(config), self.suites, strict=True):
            values = scored.values[drawn.name]
            suite = self._with_judges(drawn, scored)
            votes = scored.votes(drawn, against) if wants_votes(config) else None
            reduced = reduce_suite(
                values, suite, against=against, judges=shown, models=names, seed=config.seed, votes=votes
            )
            results[name] = replace(reduced, leaked_prompts=leaked.get(drawn.name), missing=scored.missing[drawn.name])
            gallery += choose_gallery(values, suite, against=against, judges=shown, models=in_gallery)
        return Results(results), tuple(gallery)

    def _with_judges(self, suite: Suite, scored: EvaluationScores) -> Suite:
        """Return a suite with its judges; those of the configuration are primary if it declares none itself."""
        own, judges = {entry.name for entry in self._run.config.evaluate.scorer_entries}, scored.judges[suite.name]
        primary = suite.primary or tuple(judge.name for judge in judges if judge.entry.name in own)
        names = (*(judge.name for judge in judges), *scored.derived(suite.name))
        return replace(suite.with_scorers(names), primary=primary)

    def _write(self, results: Results, gallery: Sequence[GalleryEntry], scored: EvaluationScores) -> None:
        """Write the images of the gallery, then the results; then delete what earlier evaluations left there."""
        storage, kept = self._run.storage, {f"{self._folder}/{RESULTS}"}
        for entry in gallery:
            for model, image in entry.images.items():
                png = scored.png(entry.suite, model, entry.prompt_id, entry.index)
                if png is not None:
                    kept.add(f"{self._folder}/{image.name}")
                    storage.write(f"{self._folder}/{image.name}", png)
        storage.write(f"{self._folder}/{RESULTS}", json.dumps(results.to_json(), indent=1).encode())
        for name in storage.names(self._folder):
            if name not in kept:
                storage.delete(name)
