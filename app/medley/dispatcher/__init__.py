"""The dispatcher: decides who is served and where, and writes the decision into the rows.

`policy` decides and touches nothing (`pick`, `place` and `scale` are its parts); `planner` remembers what rows do not
say and can be seen again, and asks it; `loop` leads, reads, writes and rings; `simulation` plays the loop's part on
traces.
"""
