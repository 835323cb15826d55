"""From scores to the units that stay, under a ratio or a budget.

In: scores and costs. Out: indices kept, for each group.
Invariant: the budget is met, or the choice is refused.
"""
