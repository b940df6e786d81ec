"""`python -m ncrl.tasks.cifar`."""

import sys

from ncrl.tasks.cifar.experiment import main

sys.exit(main())
