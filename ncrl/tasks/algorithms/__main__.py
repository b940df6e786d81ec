"""`python -m ncrl.tasks.algorithms`."""

import sys

from ncrl.tasks.algorithms.experiment import main

sys.exit(main())
