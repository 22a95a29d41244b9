"""The way of events out of the batching thread: all those of a step at once.

Requests share an outbox where one reader reads them together. Events lie there until they are read;
that there are some is told once per step and listener, whatever the number of streams: to wake a
thread, and to take a lock, costs more than a token.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oxillama_torch.engine.request import Event, RequestHandle

__all__ = ["Delivery", "Listener", "Outbox", "deliver"]

log = logging.getLogger(__name__)

#: Whom an event belongs to, and the event.
Delivery = tuple["RequestHandle", "Event"]

#: Gets the names (see ``Outbox.notify``) of everything that has something new; must not block.
Listener = Callable[[list[Any]], None]


class Outbox:
    """Where the events of one request, or of several, lie until their reader takes them.

    Any thread may put, one reads: either by waiting here, or when a listener tells it to.

    Attributes:
        put: adds a delivery, or None to wake the reader.
    """

    __slots__ = ("_deliveries", "_listener", "_name", "_told", "put")

    def __init__(self) -> None:
        self._deliveries: queue.SimpleQueue[Delivery | None] = queue.SimpleQueue()
        self.put = self._deliveries.put
        self._listener: Listener | None = None
        self._name: Any = None
        self._told = False

    def notify(self, listener: Listener, name: Any) -> None:
        """Have ``listener`` called with ``[name, ...]`` whenever there is something to take.

        It is called at once as well: events may have come before. Later calls come from the
        batching thread, one per step, with the names of all outboxes that it listens to and that
        were empty before.
        """
        self._name, self._listener = name, listener
        listener([name])

    def get(self, timeout_s: float | None = None) -> Delivery | None:
        """Wait for one delivery. Raises ``queue.Empty`` after ``timeout_s`` seconds."""
        return self._deliveries.get(timeout=timeout_s)

    def take(self) -> list[Delivery | None]:
        """What has come, without waiting."""
        # Before reading: what comes now is told again.
        self._told = False
        deliveries = self._deliveries
        taken = []
        while not deliveries.empty():
            taken.append(deliveries.get_nowait())
        return taken


def deliver(deliveries: Sequence[Delivery]) -> None:
    """Put events into the outboxes of their requests, then tell the listeners.

    A listener that raises loses its own requests, nobody else's.
    """
    told: dict[Listener, list[Any]] = {}
    for delivery in deliveries:
        outbox = delivery[0].outbox
        outbox.put(delivery)
        if outbox._listener is not None and not outbox._told:
            outbox._told = True
            told.setdefault(outbox._listener, []).append(outbox._name)
    for listener, names in told.items():
        try:
            listener(names)
        except Exception:
            log.exception("a listener failed; its requests are cancelled")
            for handle, _ in deliveries:
                if handle.outbox._listener is listener:
                    handle.cancel()
