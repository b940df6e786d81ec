"""`python -m ncrl.tasks.algorithms`."""

from ncrl.tasks.algorithms.experiment import main

raise SystemExit(main())
