"""An engine that generates nothing by itself: it hands out the events that a test gives it."""

from oxillama_torch.engine.request import RequestHandle

__all__ = ["ScriptedEngine"]


class ScriptedEngine:
    """``sinks``: what takes the events of each request, by its id; ``cancelled``: their ids."""

    alive = True
    max_context = 1000

    def __init__(self):
        self.sinks = {}
        self.cancelled = []

    def submit(self, request, sink=None):
        handle = RequestHandle(request, self.cancelled.append, sink)
        self.sinks[request.request_id] = lambda event: sink(request.request_id, event)
        return handle
