"""How services are seen: logs, metrics, notifications, notes of who runs, and all of it in one look."""
