"""Tasks of lm-eval, the evaluation harness, on a bundle, a checkpoint or a float model."""

import math
import os

from agq_tvm.errors import AgqError


def run_tasks(
    model: str | os.PathLike,
    tasks: list[str],
    limit: int | None = None,
    examples: int | None = None,
    threads: int | None = None,
) -> dict:
    """Run tasks of lm-eval.

    Parameters
    ----------
    model : str or path-like
        See `agq_tvm.flow.lm_eval_adapter.AgqModel`.
    tasks : list of str
        Names that lm-eval knows, or YAML files of tasks.
    limit : int, optional
        Use only so many documents of each task.
    examples : int, optional
        Solved documents before each question; by default as the task says.
    threads : int, optional
        Of a bundle; those of the device by default.

    Returns
    -------
    dict
        ``tasks``: by task the ``documents`` used and ``metrics``, a dict of ``[value, standard error or None]`` by
        the metric's name; ``lm_eval``, its version; ``limit`` and ``examples``.

    Raises
    ------
    AgqError
        If lm-eval is missing, a task or its data cannot be had, or the model does not run here.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise AgqError("running tasks needs lm-eval: pip install 'agq-tvm[lm-eval]'") from error
    from agq_tvm.flow.lm_eval_adapter import AgqModel

    ours = AgqModel(model, threads)
    try:
        found = lm_eval.simple_evaluate(
            ours, tasks=tasks, num_fewshot=examples, limit=limit, log_samples=False, task_manager=TaskManager()
        )
    except (OSError, KeyError, ValueError) as error:  # what it raises for names, files and data it cannot get
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AgqError(
            f"lm-eval cannot run {', '.join(tasks)} ({reason}): check the names, and the network for their data"
        ) from error
    samples = found["n-samples"]
    return {
        "tasks": {
            name: {"documents": samples.get(name, {}).get("effective"), "metrics": _metrics(values)}
            for name, values in found["results"].items()
        },
        "lm_eval": lm_eval.__version__,
        "limit": limit,
        "examples": examples,
    }


def _metrics(values: dict) -> dict[str, tuple[float, float | None]]:
    """Return value and standard error by ``metric``, or ``metric,filter`` if it is filtered."""
    metrics = {}
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = values.get(f"{metric}_stderr,{kind}")
            known = isinstance(error, int | float) and not math.isnan(error)
            metrics[metric if kind == "none" else key] = (float(value), float(error) if known else None)
    return metrics
