"""`python -m ncrl` is the command `ncrl`."""

import sys

from ncrl.cli import main

sys.exit(main())
