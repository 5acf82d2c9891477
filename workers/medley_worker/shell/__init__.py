"""A worker's shell: it takes the jobs assigned to this worker, has an engine process compute them, stores results.

One process is one worker, under an id of its own: `python -m medley_worker.shell`. It uses the spec, the database,
Redis and Celery of the control plane, never torch, and speaks to the engine in messages.
"""
