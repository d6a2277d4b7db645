"""What this machine has: the Prefect server that all share, processes and whether they live, file systems, space."""
