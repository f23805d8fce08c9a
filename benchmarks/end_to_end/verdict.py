"""What is asked of our models' speed: times that of the fastest 4-bit engine whose head has as many bits."""

OURS = "agq_tvm"


def verdicts(rows: list[dict], bounds: dict[str, dict[str, float]]) -> list[dict]:
    """Hold our rows against the bounds.

    Parameters
    ----------
    rows : list of dict
        Of `benchmarks.end_to_end.run.row_of`.
    bounds : dict of str to dict
        By model, those of ``"prefill"`` and ``"decode"``.

    Returns
    -------
    list of dict
        Rows that prune are held against the same form without pruning, and there is no bound for them.
    """
    found = []
    for own in rows:
        if not own["engine"].startswith(OURS):
            continue
        if own["pruned"]:
            found += _gain(own, rows)
            continue
        for work, bound in bounds[own["model"]].items():
            beside = [row for row in rows if _comparable(row, own)]
            if beside:
                fastest = max(beside, key=lambda row: row[work])
                value = own[work] / fastest[work]
                found.append(_verdict(own, work, fastest["engine"], value, bound))
    return found


def _comparable(row: dict, own: dict) -> bool:
    same = all(row[key] == own[key] for key in ("model", "threads", "bits", "head_bits"))
    return same and not row["engine"].startswith(OURS)


def _gain(own: dict, rows: list[dict]) -> list[dict]:
    plain = own["engine"].split(",")[0]
    whole = [
        row
        for row in rows
        if row["engine"] == plain and all(row[key] == own[key] for key in ("model", "threads", "head_bits"))
    ]
    return [_verdict(own, "prefill", plain, own["prefill"] / row["prefill"], None) for row in whole]


def _verdict(own: dict, work: str, beside: str, value: float, bound: float | None) -> dict:
    return {
        **{key: own[key] for key in ("model", "engine", "threads")},
        "work": work,
        "beside": beside,
        "value": value,
        "bound": bound,
        "met": None if bound is None else value >= bound,
    }
