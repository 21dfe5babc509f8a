"""Packed weights in memory, kept in step with the model's."""
