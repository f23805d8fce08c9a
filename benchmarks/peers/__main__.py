"""Install the engines that we are compared with.

    python -m benchmarks.peers --work DIR [--only shared,executorch]

llama.cpp is compiled on the way, which takes a C++ compiler and minutes.
"""

import argparse
import sys
from pathlib import Path

from agq_tvm.errors import AgqError
from benchmarks.peers import environments


def main() -> int:
    """Install, and name what failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where environments are made")
    parser.add_argument("--only", default=",".join(environments.EXTRAS), metavar="NAME,…", help="default: %(default)s")
    args = parser.parse_args()
    names, status = args.only.split(","), 0
    if unknown := set(names) - set(environments.EXTRAS):
        parser.error(f"there is no {', '.join(sorted(unknown))}: give some of {', '.join(environments.EXTRAS)}")
    for name in names:
        try:
            environments.install(args.work, name)
        except AgqError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
