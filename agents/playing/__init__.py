"""Playing: environments, the processes that play them, and how rollouts reach the learner."""
