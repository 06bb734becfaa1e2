"""Laptop-only mode: embedded broker, fleets of real client processes, and an in-process fleet."""
