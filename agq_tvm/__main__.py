"""`python -m agq_tvm` is `agq`."""

import sys

from agq_tvm.cli.main import main

sys.exit(main())
