"""What people look at: the report page, the live view, the lines at the end of a command, the result of a run.

Used by the driver and the commands. May import telemetry and what is below it; knows Dask only in
`RunResult.to_dask`, for its user.
"""
