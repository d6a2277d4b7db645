"""What runs for long around `pipelines.run`. Only this room imports prefect.

Three things read: the batch flow (`batch`, begun by `jobs`), the worker (`worker`, which `crew` hands units to) and the
watcher (`watch`, which asks `settle` what is complete); `receive` fills a watched folder. They stand on four packages:
`ledger` (which content is waiting, done, in quarantine), `schedules` (what is run when), `seeing` (logs, metrics,
notifications, status) and `machine` (server, processes, disks).
"""
