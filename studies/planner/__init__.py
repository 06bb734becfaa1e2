"""`musplit plan`: which cut, tau, K and encoding suit a fleet, and why."""
