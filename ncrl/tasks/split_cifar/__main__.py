"""`python -m ncrl.tasks.split_cifar`."""

from ncrl.tasks.split_cifar.experiment import main

raise SystemExit(main())
