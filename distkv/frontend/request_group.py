"""Requests between a caller and the engine's thread."""

from distkv import errors
from distkv.engine.loop import Broken, Delivery, Sink
from distkv.engine.protocol import PromptLogprobs, RequestFailed
from distkv.engine.thread import RunningEngine
from distkv.frontend.request_state import RequestState


class RequestGroup:
    """Requests that are sent together, until they are finished. Use by one thread at a time."""

    def __init__(self, thread: RunningEngine, states: list[RequestState]):
        self._thread = thread
        self.unfinished = {state.request.request_id: state for state in states}
        self.error: BaseException | None = None  # that ended it

    def start(self, sink: Sink) -> None:
        """Sends the requests; what `sink` gets is to be given to `take`. Raises DistKVError once the LLM is closed."""
        self._thread.add([state.request for state in self.unfinished.values()], sink)

    def take(self, deliveries: list[Delivery]) -> list[RequestState]:
        """Adds what has come to the answers; returns the requests that are to emit an output."""
        due: dict[str, RequestState] = {}
        for delivery in deliveries:
            request_id = delivery.request_id
            state = self.unfinished.get(request_id)
            if state is None:
                continue  # it was ended while this was on its way
            if isinstance(delivery, Broken):
                self.error = delivery.error
                del self.unfinished[request_id]
                continue
            if isinstance(delivery, PromptLogprobs):
                state.add_prompt_logprobs(delivery)
                continue
            if isinstance(delivery, RequestFailed):
                state.fail(getattr(errors, delivery.error)(delivery.message))
            elif state.is_finished(delivery.index):
                continue  # at a stop string
            else:
                state.add(delivery)
                if state.is_finished(delivery.index) and delivery.finish_reason is None:
                    self._thread.abort([(request_id, delivery.index)], "stop")  # the engine cannot see the string
            if state.is_due:
                due[request_id] = state
            if state.finished:
                del self.unfinished[request_id]
        return list(due.values())

    def end(self) -> None:
        """Aborts what is unfinished."""
        if self.unfinished:
            self._thread.abort([(request_id, None) for request_id in self.unfinished])
            self.unfinished.clear()
