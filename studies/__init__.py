"""Studies: matrices of arms, settings and seeds, their baselines, tables and plots."""
