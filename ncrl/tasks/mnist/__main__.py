"""`python -m ncrl.tasks.mnist`."""

from ncrl.tasks.mnist.experiment import main

raise SystemExit(main())
