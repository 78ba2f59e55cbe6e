"""The state of a run on disk; `saver.py` is the room's face."""
