"""What becomes of a test whose tools or instructions are missing: a skip that shows; in CI, which has all, failure."""

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
