"""Checkpoints in the layouts of other programs: written, read, and looked through beforehand."""
