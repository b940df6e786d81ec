"""What surrounds a run, whatever is run: hardware, signals, lock, screen, curves, safe reading."""
