"""What surrounds a run, whatever is run: files, safe reading, signals, the screen."""
