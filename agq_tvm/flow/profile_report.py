"""A profile as text."""

from agq_tvm.flow.profile_file import KINDS, OperationTimes, Profile, total
from agq_tvm.tables import as_table


def as_text(profile: Profile) -> str:
    """Write the times and shares of all operations, and the proposal."""
    threads = f"{profile.threads} thread{'s' if profile.threads > 1 else ''}"
    parts = [f"One {profile.family} block on {profile.device}, {threads} ({profile.instruction_set})"]
    if profile.emulated:
        operations = next(iter(profile.blocks.values()))
        names = ", ".join(operation.name for operation in operations)
        counts = " and ".join(str(rows) for rows in profile.blocks)
        parts.append(f"The board is emulated: every kernel ran, with {counts} rows ({names}), but time means nothing.")
    else:
        parts += [_block(rows, operations, profile) for rows, operations in profile.blocks.items()]
    if profile.load is not None and profile.load > profile.threads / 2:
        parts.append(f"The machine was busy, its load was {profile.load:.1f}: these times are too long.")
    return "\n\n".join([*parts, _proposal(profile)])


def _block(rows: int, operations: tuple[OperationTimes, ...], profile: Profile) -> str:
    lines = [("OPERATION", *(cell for form in profile.forms for cell in (f"{form} µs", "%")))]
    lines += [(operation.name, *_cells(operation, operations, profile.forms)) for operation in operations]
    lines.append(("block", *(c for form in profile.forms for c in (f"{1e6 * total(operations, form):.1f}", ""))))
    for kind in KINDS:
        shares = (total(operations, form, kind) / total(operations, form) for form in profile.forms)
        lines.append((f"all {kind}", *(c for share in shares for c in ("", f"{100 * share:.1f}"))))
    text = f"{rows} row{'s' if rows > 1 else ''}, {profile.positions} positions\n{as_table(lines)}"
    return text if rows > 1 else f"{text}\n{_weight_stream(operations, profile.forms)}"


def _weight_stream(operations: tuple[OperationTimes, ...], forms: tuple[str, ...]) -> str:
    """Say which share of decoding the linears take: with one row they do little but read their weights."""
    shares = (f"{100 * total(operations, form, 'linear') / total(operations, form):.0f} % ({form})" for form in forms)
    return f"weight stream: {', '.join(shares)}"


def _cells(operation: OperationTimes, operations: tuple[OperationTimes, ...], forms: tuple[str, ...]) -> list[str]:
    cells = []
    for form in forms:
        seconds = operation.seconds.get(form)
        share = None if seconds is None else 100 * seconds / total(operations, form)
        cells += ["-", "-"] if seconds is None else [f"{1e6 * seconds:.1f}", f"{share:.1f}"]
    return cells


def _proposal(profile: Profile) -> str:
    proposal = profile.proposal
    lines = [f"4-bit inputs: {', '.join(proposal.four_bit) or 'none'}; {proposal.reason}"]
    if any(role.cost_percent is not None for role in proposal.roles.values()):
        rows = [("INPUT OF", "SAVES %", "COSTS % AT MOST", "")]
        for name, role in proposal.roles.items():
            cost = "-" if role.cost_percent is None else f"{role.cost_percent:.2f}"
            rows.append((name, f"{role.saved_percent:.1f}", cost, "chosen" if role.chosen else ""))
        lines.append(as_table(rows))
    return "\n".join(lines)
