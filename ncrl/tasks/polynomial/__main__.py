"""`python -m ncrl.tasks.polynomial`."""

from ncrl.tasks.polynomial.experiment import main

raise SystemExit(main())
