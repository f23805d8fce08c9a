"""What MetaSchedule searches over in place of a kernel: a tiny function whose one block carries the decisions.

A trace cannot replay decisions that steer Python: which intrinsic, which tile, loops that are emitted. So every
decision is a categorical sample, written on the carrier's block, and whoever builds the candidate reads it there. All
kinds of kernels are thus searched alike, and a record's trace replays whatever becomes of the kernel's loops.
"""

import random

from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.schedule import Trace

from agq_tvm.kernels.space import Space
from agq_tvm.tvm_seam import IRBuilder, Schedule, T, tirx, tvm

_BLOCK, _PREFIX, _TASK = "carrier", "agq.", "agq.task"


def carrier(task_name: str):
    """Return the module that stands for a task."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"global_symbol": "main", "tirx.noalias": True, _TASK: task_name})
            out = T.arg("out", T.buffer((1,), "float32"))
            with T.serial(1) as i, T.sblock(_BLOCK):
                place = T.axis.spatial(1, i)
                T.buffer_store(out, tirx.const(0, "float32"), [place])
    return tvm.IRModule({"main": builder.get()})


def scheduled(module, space: Space, decisions: dict[str, int] | None = None) -> Schedule:
    """Return a carrier's schedule: `decisions`, or drawn at random if None, and maybe not allowed then."""
    sch = Schedule(module)
    _sample(sch, space, decisions)
    return sch


def _sample(sch: Schedule, space: Space, decisions: dict[str, int] | None = None) -> None:
    block = sch.get_sblock(_BLOCK)
    for name, values in space.choices.items():
        at = None if decisions is None else values.index(decisions[name])
        chosen = sch.sample_categorical(list(values), [1 / len(values)] * len(values), at)
        sch.annotate(block, _PREFIX + name, chosen)


def decisions_of(sch: Schedule) -> dict[str, int]:
    """Read the decisions on a carrier's block."""
    annotations = sch.get(sch.get_sblock(_BLOCK)).annotations
    return {str(key).removeprefix(_PREFIX): int(value) for key, value in annotations.items()}


def space_generator(space: Space, seed: int) -> ms.space_generator.ScheduleFn:
    """Return MetaSchedule's space generator of a design space."""
    return ms.space_generator.ScheduleFn(
        lambda sch: _sample(sch, space),
        sch_rules=[],
        postprocs=[Allowed(space)],
        mutator_probs={Change(space, seed): 1.0},
    )


@derived_object
class Allowed(ms.postproc.PyPostproc):
    """Rejects decisions that the space does not allow together."""

    def __init__(self, space: Space):
        super().__init__()
        self.space = space

    def _initialize_with_tune_context(self, context) -> None:
        """Nothing depends on the context."""

    def apply(self, sch: Schedule) -> bool:
        """Tell whether a schedule's decisions are a point of the space."""
        return self.space.allows(decisions_of(sch))

    def clone(self):
        """Return another one, which MetaSchedule wants for each of its threads."""
        return Allowed(self.space)


@derived_object
class Change(ms.mutator.PyMutator):
    """Changes one decision, or two where no other value of the first goes with the rest."""

    def __init__(self, space: Space, seed: int):
        super().__init__()
        self.space, self.seed = space, seed
        self.random = random.Random(seed)

    def _initialize_with_tune_context(self, context) -> None:
        """Nothing depends on the context."""

    def apply(self, trace, _) -> Trace | None:
        """Return the trace with other decisions, None if there are none."""
        samples = [inst for inst in trace.insts if inst.kind.name == "SampleCategorical"]
        names = list(self.space.choices)
        at = [int(trace.decisions[inst]) for inst in samples]
        changed = self._neighbour(names, at)
        if changed is None:
            return None
        for inst, old, new in zip(samples, at, changed, strict=True):
            if old != new:
                trace = trace.with_decision(inst, new, remove_postproc=True)
        return trace

    def _neighbour(self, names: list[str], at: list[int]) -> list[int] | None:
        values = [self.space.choices[name] for name in names]
        free = [i for i in range(len(names)) if len(values[i]) > 1]
        for changes in (1, 1, 1, 1, 2, 2, 2, 2):
            if len(free) < changes:
                continue
            new = list(at)
            for i in self.random.sample(free, changes):
                new[i] = self.random.choice([j for j in range(len(values[i])) if j != at[i]])
            point = {name: values[i][new[i]] for i, name in enumerate(names)}
            if self.space.allows(point):
                return new
        return None

    def clone(self):
        """Return another one, which MetaSchedule wants for each of its threads."""
        return Change(self.space, self.random.randrange(1 << 30))
