"""Learning: from a batch of rollouts to one step of the optimiser."""
