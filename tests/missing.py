"""What becomes of a test whose tools are missing: a skip that is seen; in CI, which has them all, a failure."""

import os
import warnings
from typing import NoReturn

import pytest


def leave_out(what: str, reason: object) -> NoReturn:
    """Skip the calling test with a warning, or in CI fail it.

    Parameters
    ----------
    what : str
        What is not tested.
    reason : str or Exception
        What is missing, and how to get it.
    """
    if os.environ.get("CI"):
        pytest.fail(f"CI must test {what}: {reason}")
    warnings.warn(f"NOT TESTED: {what}: {reason}", stacklevel=2)
    pytest.skip(f"{what}: {reason}")
