"""An engine that generates nothing by itself: it hands out the events that a test gives it."""

from oxillama_torch.engine.request import RequestHandle

__all__ = ["ScriptedEngine"]


class ScriptedEngine:
    """``senders``: hand an event to each request, by its id; ``cancelled``: their ids."""

    alive = True
    max_context = 1000

    def __init__(self):
        self.senders = {}
        self.cancelled = []

    def submit(self, request, outbox=None):
        handle = RequestHandle(request, self.cancelled.append, outbox)
        self.senders[request.request_id] = handle.put
        return handle
