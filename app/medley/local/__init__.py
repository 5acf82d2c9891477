"""Medley on one machine: embedded PostgreSQL and Redis, the table of processes, and the supervisor."""
