"""What is asked of our products: times those of the fastest engine of their class, and shares of the limits."""

OURS = "agq_tvm"
FOUR_BIT_BOUNDS = {1: 1.0, 16: 1.2, 128: 1.25}
"""By rows: time of the fastest 4-bit engine of the class over ours."""
INT8_BOUNDS = {128: 1.0}
"""The same for the fastest of the int8 engines."""
SHARE_BOUNDS = {(1, "g32"): 85.0, (1, "g128"): 85.0, (128, "g32"): 75.0, (128, "g128"): 90.0}
"""By rows and class: share of the limit, in %."""


def verdicts(rows: list[dict]) -> list[dict]:
    """Hold each of our rows against the bounds.

    Parameters
    ----------
    rows : list of dict
        Of `benchmarks.kernels.beside.row_of`, with their shares of the limit.

    Returns
    -------
    list of dict
        What was asked of which row, the engine beside it, the value, the bound, and whether it was met. Nothing is
        said of what was not measured.
    """
    found = []
    for own in rows:
        if own["engine"].startswith(OURS):
            beside = [row for row in rows if _same_product(row, own) and not row["engine"].startswith(OURS)]
            found += [_against(own, beside, own["kind"], FOUR_BIT_BOUNDS), _against(own, beside, "int8", INT8_BOUNDS)]
            found.append(_share(own))
    return [verdict for verdict in found if verdict is not None]


def _same_product(row: dict, own: dict) -> bool:
    return all(row[key] == own[key] for key in ("threads", "shape", "rows"))


def _against(own: dict, beside: list[dict], kind: str, bounds: dict[int, float]) -> dict | None:
    of_kind = [row for row in beside if row["kind"] == kind]
    if own["rows"] not in bounds or not of_kind:
        return None
    fastest = min(of_kind, key=lambda row: row["milliseconds"])
    value = fastest["milliseconds"] / own["milliseconds"]
    bound = bounds[own["rows"]]
    # A bound of 1 asks to be ahead, any other to reach it.
    met = value > bound if bound == 1.0 else value >= bound
    return _verdict(own, f"times the fastest {kind}", fastest["engine"], value, bound, met)


def _share(own: dict) -> dict | None:
    bound, share = SHARE_BOUNDS.get((own["rows"], own["kind"])), own["share_percent"]
    if bound is None or share is None:
        return None
    return _verdict(own, f"% of the limit in {own['unit']}", None, share, bound, share >= bound)


def _verdict(own: dict, what: str, beside: str | None, value: float, bound: float, met: bool) -> dict:
    return {
        **{key: own[key] for key in ("engine", "threads", "shape", "rows")},
        "what": what,
        "beside": beside,
        "value": value,
        "bound": bound,
        "met": met,
    }
