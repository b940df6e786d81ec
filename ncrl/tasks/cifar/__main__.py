"""`python -m ncrl.tasks.cifar`."""

from ncrl.tasks.cifar.experiment import main

raise SystemExit(main())
