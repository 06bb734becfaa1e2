"""What is asked of many runs: studies with their baselines, and the planner."""
