"""Studies of a model: what FP4 costs in accuracy, what it does to latency."""

from fp4graph.study.studies import ablate, additivity, latency, outliers, sensitivity, tasks
from fp4graph.study.table import Table

__all__ = ["Table", "ablate", "additivity", "latency", "outliers", "sensitivity", "tasks"]
