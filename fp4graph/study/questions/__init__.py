"""The project's own questions, as tasks of lm-evaluation-harness."""
