"""`python -m ncrl.tasks.split_mnist`."""

from ncrl.tasks.split_mnist.experiment import main

raise SystemExit(main())
