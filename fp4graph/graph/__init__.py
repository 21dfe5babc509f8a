"""Reads a traced graph and changes nothing."""
