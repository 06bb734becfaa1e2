"""Power and energy of the board: meters, one sampler, integration, phases."""
