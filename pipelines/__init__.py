"""The rooms joined: ingest -> encode -> bridge -> decode -> report, and what trains and scores the model."""
