"""The truth: tables, connections, and the state machine of a job as explicit SQL.

Every function takes an open SQLAlchemy connection and neither begins nor commits: one transaction a request or
task, committed where it was opened. Only the database's clock decides (`clock_timestamp()`).

Lock order, the same in every transaction: leader or worker, batches by id, jobs. Counters and demand lock nothing: who
changes them inserts (`medley.db.demand`), and only the leader sums up.
"""
