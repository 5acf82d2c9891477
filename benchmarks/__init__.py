"""One command a figure. Each writes `results/<machine>-<what>.json`: machine, date, versions, command, rows."""
