"""A profile as text."""

from agq_tvm.flow.profile_file import KINDS, SECTIONS, OperationTimes, Profile, roles_in, total
from agq_tvm.tables import as_table

Operations = tuple[OperationTimes, ...]


def as_text(profile: Profile) -> str:
    """Write the times and shares of all operations, and the proposal."""
    parts = [f"{title(profile)}\n{choices(profile)}"]
    if profile.emulated:
        operations = next(iter(profile.operations.values()))
        names = ", ".join(operation.name for operation in operations)
        counts = " and ".join(str(rows) for rows in profile.operations)
        parts.append(f"The board is emulated: every kernel ran, with {counts} rows ({names}), but time means nothing.")
    else:
        parts += [_call(rows, operations, profile) for rows, operations in profile.operations.items()]
    if profile.load is not None and profile.load > profile.threads / 2:
        parts.append(
            f"The machine was busy, its load was {profile.load:.1f}: these times are too long, and shares noisy."
        )
    return "\n\n".join([*parts, _proposal(profile)])


def title(profile: Profile) -> str:
    """Say what was profiled, and where."""
    blocks = f"{profile.layers} block{'s' if profile.layers > 1 else ''}"
    threads = f"{profile.threads} thread{'s' if profile.threads > 1 else ''}"
    return f"{profile.family}, {blocks} and head, on {profile.device}, {threads} ({profile.instruction_set})"


def choices(profile: Profile) -> str:
    """Say what the checkpoint and `agq compile` chose."""
    head = "float16" if profile.head_bits == 16 else f"{profile.head_bits}-bit"
    activation = "float" if profile.activation == "none" else profile.activation
    return f"a bundle runs {profile.own}: {activation} activations, {profile.cache} caches, {head} head"


def rows_of(rows: int, profile: Profile) -> str:
    """Say which call of the decoder was timed."""
    return f"{'decode' if rows == 1 else f'prefill, {rows} rows'}, {profile.positions} positions"


def _call(rows: int, operations: Operations, profile: Profile) -> str:
    forms = profile.forms
    lines = [("OPERATION", *(cell for form in forms for cell in (f"{form} µs", "%")))]
    for section in SECTIONS:
        inside = [operation for operation in operations if operation.section == section]
        times = profile.layers if section == "block" else 1
        lines += [(each.name, *_cells([each], operations, forms, times)) for each in inside]
        if section == "block":
            lines.append(("one block", *_cells(inside, operations, forms, times)))
            lines.append((f"all {times} blocks", *_cells(inside, operations, forms)))
    lines.append(("decoder", *_cells(operations, operations, forms)))
    for kind in KINDS:
        lines.append((f"all {kind}", *_cells([each for each in operations if each.kind == kind], operations, forms)))
    text = f"{rows_of(rows, profile)}\n{as_table(lines)}"
    return text if rows > 1 else f"{text}\n\n{weight_stream(operations, profile)}"


def _cells(
    some: list[OperationTimes] | Operations, every: Operations, forms: tuple[str, ...], times: int = 1
) -> list[str]:
    """Write for each form the time of some operations, one of so many times, and the share of all of these."""
    cells = []
    for form in forms:
        seconds, share = total(some, form), 100 * total(some, form) / total(every, form)
        done = any(form in operation.seconds for operation in some)
        cells += [f"{1e6 * seconds / times:.1f}", f"{share:.1f}"] if done else ["-", "-"]
    return cells


def weight_stream(operations: Operations, profile: Profile) -> str:
    """Say which share of decoding the products take: with one row they do little but read their weights."""
    shares = profile.weight_stream()
    outside = [each.name for each in operations if each.kind == "linear" and each.section != "block"]
    own = shares[profile.own]
    others = ", ".join(f"{form} {100 * share['model']:.0f} %" for form, share in shares.items() if form != profile.own)
    return (
        f"weight stream: {100 * own['model']:.1f} % of a decode step in {profile.own}, as a bundle runs: "
        f"{', '.join(roles_in(operations))} of {profile.layers} blocks, and {', '.join(outside)} "
        f"(in a block alone {100 * own['block']:.1f} %)\nin the other forms: {others}"
    )


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
