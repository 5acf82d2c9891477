"""What both sides of Medley speak: ids, job and sampling types, wire messages, model and adapter headers.

Stands on the standard library and msgspec alone: no torch, no SQL, no Redis, no HTTP.
"""
