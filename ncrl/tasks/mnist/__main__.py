"""`python -m ncrl.tasks.mnist`."""

import sys

from ncrl.tasks.mnist.experiment import main

sys.exit(main())
