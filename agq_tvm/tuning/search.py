"""Which candidates of a task are worth measuring: MetaSchedule's evolutionary search, or chance."""

import logging
import random
from collections.abc import Iterable

from tvm.s_tir import meta_schedule as ms

from agq_tvm.errors import AgqError
from agq_tvm.kernels.space import Space
from agq_tvm.tuning.carrier import carrier, scheduled, space_generator
from agq_tvm.tuning.carrier import decisions_of as read
from agq_tvm.tuning.context import tune_context
from agq_tvm.tuning.features import KernelFeatures
from agq_tvm.tuning.task import Task
from agq_tvm.tvm_seam import Target

STRATEGIES = ("evolutionary", "random")
_WARM_UP = 16
"""Measurements before the cost model is asked."""
_POPULATION, _GENERATIONS = 48, 2
_EMPTY = 3
"""Batches with nothing new after which the rest is left to chance."""


class CostModel:
    """One XGBoost model for all tasks of a run: what is slow in one shape is mostly slow in the next.

    Raises
    ------
    AgqError
        If xgboost is not installed.
    """

    def __init__(self):
        try:
            import xgboost  # noqa: F401
        except ImportError:
            raise AgqError(
                "the evolutionary search needs xgboost: pip install 'agq-tvm[tune]', or take --strategy random"
            ) from None
        logging.getLogger("tvm.s_tir.meta_schedule").setLevel(logging.ERROR)
        self.features = KernelFeatures()
        self.model = ms.cost_model.XGBModel(
            extractor=self.features, num_warmup_samples=_WARM_UP, num_tuning_cores=1, tree_method="hist"
        )

    def add(self, task: Task) -> None:
        """Make a task known."""
        self.features.tasks[task.name] = task


class Search:
    """The search of one task.

    Parameters
    ----------
    task : Task
    cost_model : CostModel or None
        None leaves everything to chance.
    known : iterable of (decisions, seconds or None)
        What was measured before; None is a failure. It is never proposed again, and teaches the model.
    batch : int
        Candidates that are proposed at a time.
    default : bool
        Whether the hand-made point is proposed, first of all.
    seed : int
    hints : iterable of decisions
        What was best for similar kernels: proposed next, where the space allows it.
    """

    def __init__(
        self,
        task: Task,
        cost_model: CostModel | None,
        known: Iterable[tuple[dict, list[float] | None]] = (),
        batch: int = 16,
        default: bool = True,
        seed: int = 0,
        hints: Iterable[dict[str, int]] = (),
    ):
        self.task, self.batch, self.random = task, batch, random.Random(seed)
        self.space: Space = task.space
        self.model, self.module = cost_model, carrier(task.name)
        self.target = Target(task.device.tvm_target())
        points = self.space.points()
        self.open = {_key(point): point for point in points if default or point != self.space.default}
        self._first = ([self.space.default] if default else []) + [hint for hint in hints if self.space.allows(hint)]
        self.size = len(self.open)
        self.context = self.database = None
        if cost_model is not None and self.size > batch:
            self._begin(seed)
        self.tell([(decisions, seconds) for decisions, seconds in known if self.space.allows(decisions)])

    def _begin(self, seed: int) -> None:
        self.model.add(self.task)
        self.database = ms.database.MemoryDatabase()
        self.context = tune_context(
            mod=self.module,
            target=self.target,
            space_generator=space_generator(self.space, seed),
            search_strategy=ms.search_strategy.EvolutionarySearch(
                population_size=_POPULATION, init_min_unmeasured=_POPULATION // 3, genetic_num_iters=_GENERATIONS
            ),
            task_name=self.task.name,
            rand_state=seed + 1,
        )
        spaces = self.context.generate_design_space()
        self.context.pre_tuning(1 << 30, self.batch, spaces, self.database, self.model.model)

    def propose(self, count: int) -> list[dict[str, int]]:
        """Return up to `count` points that are not known; fewer if there are no more, and they count as known now."""
        proposed = list({_key(point): point for point in self._first if _key(point) in self.open}.values())
        self._first = proposed[count:]
        empty = 0
        while self.context and len(proposed) < count < len(self.open) and empty < _EMPTY:
            fresh = [point for point in self._evolve() if _key(point) in self.open and point not in proposed]
            empty += not fresh
            proposed += fresh
        rest = [point for point in self.open.values() if point not in proposed]
        missing = min(max(0, count - len(proposed)), len(rest))
        proposed += self.random.sample(rest, missing)
        for point in proposed[:count]:
            del self.open[_key(point)]
        return proposed[:count]

    def _evolve(self) -> list[dict[str, int]]:
        candidates = self.context.search_strategy.generate_measure_candidates()
        if candidates is None:
            return []
        self.context.search_strategy.notify_runner_results(candidates, [])
        return [read(candidate.sch) for candidate in candidates]

    def tell(self, results: Iterable[tuple[dict, list[float] | None]]) -> None:
        """Learn from (decisions, seconds); None is a failure."""
        results = list(results)
        for decisions, _ in results:
            self.open.pop(_key(decisions), None)
        if not self.context or not results:
            return
        schedules = [scheduled(self.module, self.space, decisions) for decisions, _ in results]
        candidates = [ms.MeasureCandidate(sch, []) for sch in schedules]
        outcomes = [
            ms.runner.RunnerResult(list(seconds), None) if seconds else ms.runner.RunnerResult(None, "failed")
            for _, seconds in results
        ]
        workload = self.database.commit_workload(self.module)
        for sch, (_, seconds) in zip(schedules, results, strict=True):
            if seconds:
                record = ms.database.TuningRecord(sch.trace, workload, list(seconds), self.target, [])
                self.database.commit_tuning_record(record)
        self.model.model.update(self.context, candidates, outcomes)

    def give_back(self, decisions: dict[str, int]) -> None:
        """Let a point be proposed again, next of all, that was not measured."""
        self.open[_key(decisions)] = decisions
        self._first.append(decisions)


def tuning_record(task: Task, decisions: dict[str, int], seconds) -> list:
    """Return MetaSchedule's own tuning record of a measurement, as plain JSON."""
    space = task.space
    module = carrier(task.name)
    workload = ms.database.Workload(module)
    sch = scheduled(module, space, decisions)
    return ms.database.TuningRecord(sch.trace, workload, list(seconds), Target(task.device.tvm_target()), []).as_json()


def _key(decisions: dict[str, int]) -> tuple:
    return tuple(sorted(decisions.items()))
