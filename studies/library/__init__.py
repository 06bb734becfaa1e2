"""The study files that ship with musplit."""
