"""CPU tasks of the service: what is too long for a request and needs no GPU.

`worker` is the process; a module a task beside it. A task's message holds an id at the most: its rows say what is to
be done, so a message may be lost or doubled.
"""
