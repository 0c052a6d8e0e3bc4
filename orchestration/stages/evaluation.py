"""The work of the stage `evaluate`: draw what is missing, score what is missing, reduce, and choose what to show."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from orchestration.run.context import EVALUATION, RESULTS
from orchestration.stages.evaluation_cost import cost_line, gpu_hours
from orchestration.stages.evaluation_images import (
    audit_rows,
    can_audit,
    images_of,
    no_values,
    sample_of,
    samples_of,
    values_of,
    with_rows_of,
)
from orchestration.stages.held_out import HeldOutPairs
from orchestration.stages.judged_models import (
    JudgedModel,
    check_against,
    is_here,
    judged_models,
    remove_unets,
    write_unets,
)
from orchestration.stages.judged_scorers import judges_of, shown_judges
from orchestration.stages.judged_suites import judged_suites, names_of_suites
from orchestration.stages.judged_votes import shown_votes, votes_of, wants_votes
from pipelines.resources import uses_gpu
from pipelines.samples.drawing import Drawing, Sampling
from pipelines.samples.execution import draw, read_samples
from pipelines.samples.fingerprint import samples_fingerprint
from pipelines.samples.plan import count_missing, distinct_samples, unit_size
from pipelines.scores.execution import score
from pipelines.scores.images import JUDGES, REQUIRED
from pipelines.scores.plan import read_scores
from pipelines.suites.audit import JudgeAgreement, audit
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
    from pipelines.scores.judges import Judge
    from pipelines.suites.votes import Votes


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
        drawn = self._draw()
        shown = shown_judges(judge for each in judges.values() for judge in each)
        scored = _Scored(self, judges)
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
        """Say how many units are missing, and what drawing them would take of an H200."""
        missing = self.missing
        if not any(missing.values()):
            return ()
        size = unit_size(self._run.config.evaluate.batch_size)
        return (cost_line(sum(-(-each // size) for each in missing.values()), gpu_hours(self._drawings, missing)),)

    def _cost(self, drawn: Sequence[Drawn], seconds: float) -> EvaluationCost:
        gpu_hours = sum(each.worker_s for each in drawn) / 3600 if self.on_gpu else None
        return EvaluationCost(sum(each.num_drawn for each in drawn), gpu_hours, seconds)

    def _reduce(self, scored: _Scored, shown: Mapping[str, ShownJudge]) -> tuple[Results, tuple[GalleryEntry, ...]]:
        config = self._run.config
        against, names = config.evaluate.against, [model.name for model in self.models]
        in_gallery = [name for name in names if step_of(name) is None]
        in_gallery = sorted(in_gallery if len(in_gallery) > 1 else names, key=lambda name: name != against)
        results: dict[str, SuiteResult] = {}
        gallery: list[GalleryEntry] = []
        leaked = {} if self._trained is None else self.held_out.leaked(self.suites)
        for name, drawn in zip(names_of_suites(config), self.suites, strict=True):
            values = scored.values[drawn.name]
            suite = self._with_judges(drawn, scored.judges[drawn.name])
            votes = scored.votes(drawn, against) if wants_votes(config) else None
            reduced = reduce_suite(
                values, suite, against=against, judges=shown, models=names, seed=config.seed, votes=votes
            )
            results[name] = replace(reduced, leaked_prompts=leaked.get(drawn.name))
            gallery += choose_gallery(values, suite, against=against, judges=shown, models=in_gallery)
        return Results(results), tuple(gallery)

    def _with_judges(self, suite: Suite, judges: Sequence[Judge]) -> Suite:
        """Return a suite with its judges; those of the configuration are primary if it declares none itself."""
        own = {entry.name for entry in self._run.config.evaluate.scorer_entries}
        primary = suite.primary or tuple(judge.name for judge in judges if judge.entry.name in own)
        return replace(suite.with_scorers(judge.name for judge in judges), primary=primary)

    def _write(self, results: Results, gallery: Sequence[GalleryEntry], scored: _Scored) -> None:
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


class _Scored:
    """The scores of an evaluation whose samples are drawn: scores what is missing, and reads the values.

    Args:
        evaluation: The evaluation.
        judges: The judges of each suite.
    """

    def __init__(self, evaluation: Evaluation, judges: Mapping[str, Sequence[Judge]]) -> None:
        self._evaluation, self.judges, self._storage = evaluation, judges, evaluation.storage
        self._samples = {
            (cell.suite.name, cell.model.name): read_samples(self._storage, cell.drawing) for cell in evaluation.cells
        }
        self._suites = {cell.suite.name: cell.suite for cell in evaluation.cells}
        self._images = {
            place: images_of(samples, judges[place[0]], self._suites[place[0]])
            for place, samples in self._samples.items()
        }
        self._auditors = [judge for judge in self._every() if can_audit(judge)] if evaluation.max_audit_pairs else []
        self._sides = evaluation.held_out.sides(evaluation.max_audit_pairs) if self._has_pairs() else None
        self._score()
        self.values = {name: self._values(name) for name in judges}
        """Rows of VALUES_SCHEMA and `components` by suite: one for each image of each model and judge."""

    def _every(self) -> list[Judge]:
        return list({judge.name: judge for each in self.judges.values() for judge in each}.values())

    def _has_pairs(self) -> bool:
        return bool(self._auditors) and self._evaluation.held_out.is_held_out

    def _score(self) -> None:
        """Score what is missing in one execution: samples by the judges of their suite, pairs by those that audit."""
        tables = [_judged(images, self.judges[suite]) for (suite, _), images in self._images.items()]
        if self._sides is not None:
            tables.append(_judged(self._sides.select(REQUIRED.names), self._auditors))
        if every := self._every():
            images = pa.concat_tables(tables, promote_options="default")
            score(self._storage, every, images, self._evaluation.workers, self._evaluation.say)

    def _values(self, suite: str) -> pa.Table:
        """Read the values of a suite, each judge's table once."""
        models = {model: samples for (of_suite, model), samples in self._samples.items() if of_suite == suite}
        images = {model: self._images[suite, model] for model in models}
        found = []
        for judge in self.judges[suite]:
            scores = read_scores(self._storage, judge, pa.concat_tables(images.values()))
            for model, samples in models.items():
                own = scores.slice(0, images[model].num_rows)
                scores = scores.slice(images[model].num_rows)
                found.append(values_of(model, judge, samples, own))
        values = pa.concat_tables(found, promote_options="default") if found else no_values()
        return with_rows_of(self._suites[suite], values)

    def audit(self, shown: Mapping[str, ShownJudge]) -> dict[str, JudgeAgreement]:
        """Compare the judges with the human labels of held-out pairs."""
        if self._sides is None:
            return {}
        images = self._sides.select(REQUIRED.names)
        rows = [audit_rows(judge, self._sides, read_scores(self._storage, judge, images)) for judge in self._auditors]
        return audit(pa.concat_tables(rows), judges=shown)

    def votes(self, suite: Suite, against: str) -> Votes:
        """Count the votes of people on the images of a suite."""
        samples = {model: each for (name, model), each in self._samples.items() if name == suite.name}
        return votes_of(self._storage, suite, samples, against, self._evaluation.say)

    def png(self, suite: str, model: str, prompt_id: str, index: int) -> bytes | None:
        """Return the bytes of a sample; None if it could not be drawn."""
        samples = self._samples[suite, model]
        sample_id, place = sample_of(self._suites[suite], prompt_id, index)
        where = (pc.field("prompt_id") == sample_id) & (pc.field("index") == place) & pc.field("shard").is_valid()
        found = samples.filter(where).to_pylist()
        if not found:
            return None
        row = found[0]
        return self._storage.read_range(row["shard"], row["offset"], row["length"], row["sha256"])


def _judged(images: pa.Table, judges: Sequence[Judge]) -> pa.Table:
    """Return the images with the names of their judges."""
    names = "\n".join(judge.name for judge in judges)
    return images.append_column(JUDGES, pa.array([names] * images.num_rows, pa.string()))
