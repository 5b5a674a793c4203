"""Real runs under faults from a seed: a store that fails, processes that are killed and paused, two drivers at once.

`python -m tests.chaos --seed 7 --minutes 20` from the repository's root; the same seed gives the same faults.
"""
