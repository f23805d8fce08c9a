"""Which inputs of linears should have 4 bits on a device: what saves time there, within a budget of perplexity."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from agq_tvm.flow.profile_file import OperationTimes, Proposal, RoleProposal, roles_in, total
from agq_tvm.progress import say
from agq_tvm.quantize.calibration import cut_windows
from agq_tvm.quantize.checkpoint import Checkpoint
from agq_tvm.runtime.perplexity import Difference, Score, compare, score

TEXT = "calibration"
WINDOWS = 8
WINDOW = 512

# By rows.
Times = Mapping[int, tuple[OperationTimes, ...]]
# From roles to the perplexity, in percent, that 4 bits at their inputs cost together.
Measure = Callable[[tuple[str, ...]], float]


def savings(times: Times) -> dict[str, float]:
    """Return what 4-bit inputs of each role save, in percent of the decoder's time in W4A8, mean over the rows.

    A difference within the spread of the two times that it is between counts as none, as does one below 0.
    """
    saved: dict[str, list[float]] = {}
    for operations in times.values():
        whole, roles = total(operations, "w4a8"), roles_in(operations)
        for operation in operations:
            if operation.kind == "linear" and operation.name in roles:
                gain = operation.seconds["w4a8"] - operation.seconds["w4a4"]
                noise = operation.spread["w4a8"] + operation.spread["w4a4"]
                saved.setdefault(operation.name, []).append(100 * gain / whole if gain > noise else 0.0)
    return {role: sum(values) / len(values) for role, values in saved.items()}


def choose(saved: Mapping[str, float], costs: Mapping[str, float], budget: float) -> tuple[str, ...]:
    """Choose roles by what they save for what they cost, the best first, while the costs' sum is within the budget.

    Parameters
    ----------
    saved, costs : mapping of str to float
        In percent; only roles with costs can be chosen.
    budget : float
        In percent.
    """
    chosen, spent = [], 0.0
    for role in sorted(costs, key=lambda role: _worth(saved[role], costs[role]), reverse=True):
        if saved[role] > 0 and spent + costs[role] <= budget:
            chosen.append(role)
            spent += costs[role]
    return tuple(chosen)


def _worth(saved: float, cost: float) -> float:
    return saved / cost if cost > 0 else math.inf


def propose(saved: Mapping[str, float], measure: Measure, budget: float) -> Proposal:
    """Propose roles for 4 bits.

    Each is measured by itself, `choose` chooses, and the chosen ones are measured together; while that is over the
    budget, the one chosen last is given up.

    Parameters
    ----------
    saved : mapping of str to float
        By role, see `savings`.
    measure : callable
        Called for roles that save something only.
    budget : float
        In percent.
    """
    gains = [role for role, percent in saved.items() if percent > 0]
    if not gains:
        return none(budget, "no input is faster with 4 bits than with 8 on this device", saved)
    costs = {role: measure((role,)) for role in gains}
    chosen = choose(saved, costs, budget)
    together = measure(chosen) if len(chosen) > 1 else costs.get(chosen[0]) if chosen else None
    while chosen and together > budget:
        chosen = chosen[:-1]
        together = (measure(chosen) if len(chosen) > 1 else costs[chosen[0]]) if chosen else None
    roles = {role: RoleProposal(percent, costs.get(role), role in chosen) for role, percent in saved.items()}
    return Proposal(budget, chosen, together, _reason(saved, chosen, together, budget), roles)


def none(budget: float, reason: str, saved: Mapping[str, float]) -> Proposal:
    """Propose nothing, for a reason."""
    return Proposal(
        budget, (), None, reason, {role: RoleProposal(percent, None, False) for role, percent in saved.items()}
    )


def _reason(saved: Mapping[str, float], chosen: tuple[str, ...], cost: float | None, budget: float) -> str:
    if not chosen:
        return f"4 bits would save time, but at every input alone they cost more than {budget:g} % of perplexity"
    time = sum(saved[role] for role in chosen)
    return f"4 bits at these inputs save {time:.1f} % of the time and cost at most {cost:.2f} % of perplexity"


@dataclass
class PerplexityCost:
    """Measures, with the torch reference on a few windows of text, what 4-bit inputs cost.

    Parameters
    ----------
    checkpoint : Checkpoint
        Its own way to quantize activations, all of them to 8 bits, is the baseline.
    text : str
        See `agq_tvm.quantize.texts.load_text`.
    """

    checkpoint: Checkpoint
    text: str = TEXT
    baseline: Score | None = None

    def __call__(self, roles: tuple[str, ...]) -> float:
        """Return the change of perplexity in percent, mean and two standard errors, at least 0."""
        if self.baseline is None:
            self.baseline = self.score(())
        difference = compare(self.score(roles), self.baseline)
        say(f"4 bits at the inputs of {', '.join(roles)}: perplexity {100 * difference.perplexity_change:+.2f} %")
        return upper_percent(difference)

    def score(self, roles: tuple[str, ...]) -> Score:
        """Score the text with 4-bit inputs of these roles."""
        from agq_tvm.quantize.reference import ReferenceModel

        length = min(WINDOW, self.checkpoint.config.context_length)
        windows = cut_windows(self.checkpoint.path / "tokenizer.json", self.text, WINDOWS, length)
        model = ReferenceModel.from_checkpoint(self.checkpoint.with_four_bit(roles))
        return score(model.logits, [token for window in windows for token in window], length)


def upper_percent(difference: Difference) -> float:
    """Return mean and two standard errors of a change of perplexity in percent, at least 0."""
    error = difference.perplexity_change_stderr
    return max(0.0, 100 * (difference.perplexity_change + (2 * error if math.isfinite(error) else 0.0)))
