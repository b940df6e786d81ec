"""`python -m ncrl.tasks.split_mnist`."""

import sys

from ncrl.tasks.split_mnist.experiment import main

sys.exit(main())
