"""The planner: which drafter, how deep, and whether at all, at every step. Start at `batch_planner.py`."""
