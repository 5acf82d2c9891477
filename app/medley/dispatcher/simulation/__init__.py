"""`medley simulate`: the dispatcher's policy on traces, with thousands of virtual workers.

The policy, what it remembers and the loop's order of things are the dispatcher's own (`planner`); SQL, Redis and the
network are one constant round trip. A virtual worker is not an engine: its speed is the step-time model. What the
simulator leaves out: KV pages and preemption, stop strings, prefix reuse, the split of prompts into chunks (a prompt
delays its worker by what its tokens cost), failures, the time that PostgreSQL takes for large claims, and hosts whose
workers differ.
"""
