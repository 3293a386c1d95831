"""What is told of a transfer: report, log lines, events, spans and metrics, progress.

Not here: anything that decides how the transfer goes on.
"""
