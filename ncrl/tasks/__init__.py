"""The paper's experiments outside reinforcement learning: networks, recipes, parameter counts."""
