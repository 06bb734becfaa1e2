"""What boards are provisioned with; shipped in the wheel so that a board finds its unit file."""
