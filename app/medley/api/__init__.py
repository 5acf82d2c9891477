"""The HTTP service: one module a resource, SQL on threads, waiting without any.

`app.create_app(settings)` is the application, `server.serve(settings)` the process. A request is judged whole
before anything is written; one that succeeds has committed.
"""
