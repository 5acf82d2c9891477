"""The dispatcher: decides who is served and where, and writes the decision into the rows.

`policy` decides and touches nothing; `sightings` remembers what rows do not say and can be seen again; `loop` leads,
reads, writes and rings.
"""
