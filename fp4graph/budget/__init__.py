"""The best mix for a budget: what each linear may run as, what that costs, which choice is best."""

from fp4graph.budget.find import best_policy

__all__ = ["best_policy"]
