"""`python -m mghf_loss` is the command `mghf-loss`."""

import sys

from .cli import main

sys.exit(main())
