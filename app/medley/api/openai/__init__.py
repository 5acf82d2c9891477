"""The OpenAI-compatible interface under /openai/v1: other words for native batches, jobs and adapters.

One module a resource, and between them two seams: `requests` turns a body into jobs' fields, `choices` turns jobs'
results into what an answer shows. The model of a request is the base, or an adapter.
"""
