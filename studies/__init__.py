"""What is asked of many runs: baselines, studies, and the planner."""
