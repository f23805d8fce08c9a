"""Matrix products of LLaMA-7B's shapes, beside what the processor can do at best in the same run.

    python -m benchmarks.kernels [--rounds N] [--json FILE]
    python -m benchmarks.kernels --peers --work DIR [--threads 1,2] [--only TEXT,TEXT] [--rounds N] [--seconds S]

The second form is for other engines too, which `python -m benchmarks.peers --work DIR` installs. Activations are
float32 then, their quantization included, and each engine has a process of its own; rounds go through all of them.
"""

import argparse
import sys
from pathlib import Path

from agq_tvm.errors import AgqError
from benchmarks import tables
from benchmarks.kernels import beside, own


def main() -> None:
    """Read the command line, and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=21, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: in benchmarks/results")
    peers = parser.add_argument_group("beside other engines")
    peers.add_argument("--peers", action="store_true", help="measure them too")
    peers.add_argument("--work", type=Path, metavar="DIR", help="where they are installed; operands are kept there")
    tables.add_run_options(peers)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.peers != (args.work is not None):
        parser.error("--peers and --work DIR go together")
    try:
        if args.peers:
            run = beside.Run(args.work, args.only, args.rounds, args.seconds)
            beside.measure(run, args.threads, args.json or tables.RESULTS / "kernels_peers.json")
        else:
            own.measure(args.rounds, args.json or tables.RESULTS / "kernels.json")
    except AgqError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
