"""What pyproject.toml cannot say: the library of schedules, a folder at the top, is a part of the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["agq_tvm*"]), "agq_tvm.schedules"],
    package_dir={"agq_tvm.schedules": "schedules"},
)
