"""The server node: coordinator, unbalanced updates, aggregation, journal, evaluation, serving."""
