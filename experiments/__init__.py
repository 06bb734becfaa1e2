"""Run configurations, shipped so that `musplit emulate` has a default anywhere."""
