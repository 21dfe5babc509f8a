"""Runs a model to find codes that fit its inputs."""
