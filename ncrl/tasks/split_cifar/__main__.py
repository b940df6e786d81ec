"""`python -m ncrl.tasks.split_cifar`."""

import sys

from ncrl.tasks.split_cifar.experiment import main

sys.exit(main())
