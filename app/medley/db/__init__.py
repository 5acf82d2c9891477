"""The truth: tables, connections, and the state machine of a job as explicit SQL.

Every function takes an open SQLAlchemy connection and neither begins nor commits: one transaction a request or
task, committed where it was opened. Only the database's clock decides (`clock_timestamp()`).

Lock order, the same in every transaction: leader or worker, batches by id, jobs, tenant counters by id, demand by
(pool, lane, priority). Counters and demand are written by one ordered upsert each (`medley.db.demand`).
"""
