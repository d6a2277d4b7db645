"""What is run when: timing, the files that say so, who runs it, and how Prefect's page shows it."""
