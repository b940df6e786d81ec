"""`python -m ncrl.tasks.polynomial`."""

import sys

from ncrl.tasks.polynomial.experiment import main

sys.exit(main())
