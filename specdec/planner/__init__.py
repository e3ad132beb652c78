"""The planner: which drafter, how deep, and whether at all, at every step. Start at `batch_planner.py`.

An *option* is one way to draft. A *candidate* is an option at one depth, with the tokens and milliseconds that it
promises. A *budget* is what one step may draft, and with which option. A *planner* hands out the budgets of one call; a
*cost table* says what steps take on this machine.
"""
