"""What the cost model sees of a candidate: MetaSchedule's features of the kernel's stores, and the decisions."""

import math

import numpy as np
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from agq_tvm.kernels import tunable
from agq_tvm.tuning.carrier import decisions_of
from agq_tvm.tuning.context import tune_context
from agq_tvm.tuning.task import Task
from agq_tvm.tvm_seam import Schedule, Target, tvm

_STORE, _DECISIONS = 164, 24


@derived_object
class KernelFeatures(ms.feature_extractor.PyFeatureExtractor):
    """Extracts features from the kernels that carriers stand for; each is built once.

    Decisions stand beside the stores' features because these say nothing of some, such as how far ahead is prefetched.
    """

    def __init__(self):
        super().__init__()
        self.tasks: dict[str, Task] = {}
        self.cached: dict[tuple, np.ndarray] = {}
        self.columns: dict[str, int] = {}
        self.stores = ms.feature_extractor.PerStoreFeature()

    def extract_from(self, context, candidates) -> list:
        """Return a float64 [stores, features] for each candidate."""
        task = self.tasks[str(context.task_name)]
        return [tvm.runtime.tensor(self._of(task, decisions_of(candidate.sch))) for candidate in candidates]

    def _of(self, task: Task, decisions: dict[str, int]) -> np.ndarray:
        key = task.name, tuple(decisions.items())
        if key not in self.cached:
            stores = self._stores(task, decisions)
            row = self._row(type(task.kernel).__name__, decisions)
            self.cached[key] = np.concatenate([stores, np.tile(row, (len(stores), 1))], axis=1)
        return self.cached[key]

    def _stores(self, task: Task, decisions: dict[str, int]) -> np.ndarray:
        """Return float64 [stores, 164]; zeros of a kernel that cannot be built, as its measurement will say."""
        try:
            func = tunable.build(task.kernel, task.instruction_set, decisions).with_attr("global_symbol", "main")
            module = tvm.IRModule({"main": func})
            context = tune_context(mod=module, target=Target(task.device.tvm_target()))
            candidate = ms.MeasureCandidate(Schedule(module), [])
            found = self.stores.extract_from(context, [candidate])[0].numpy()
        except Exception:
            found = np.zeros((0, _STORE))
        return found if found.ndim == 2 and found.shape[0] else np.zeros((1, _STORE))

    def _row(self, kind: str, decisions: dict[str, int]) -> np.ndarray:
        """Return decisions as numbers; what has the same name in the same kind of kernel has the same column."""
        row = np.zeros(_DECISIONS)
        for name, value in decisions.items():
            column = self.columns.setdefault(f"{kind}.{name}", len(self.columns) % _DECISIONS)
            row[column] = math.copysign(math.log2(1 + abs(value)), value)
        return row
