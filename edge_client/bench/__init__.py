"""Latency, memory and energy of client bundles on this machine, as evidence that can be checked."""
