"""Benchmarks: `make bench` runs bench.py; docs/performance.md tells what each limit is."""
