"""Training, evaluating and filming A3C on an Atari game: what `run_atari.py` does."""
