"""Comparisons: baselines in the harness of the method, parameter studies."""
