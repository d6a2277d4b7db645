"""Prefect flows around `pipelines.run`. Only this room imports prefect."""
