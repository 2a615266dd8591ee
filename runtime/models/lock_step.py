"""LockStep: forward passes of several sequences side by side, so that each MoE layer is one exchange for all of them.

    pass 1   --- layer code ---> tap |                     | ---> layer code ---> tap | ...
    pass 2   --- layer code ---> tap | one exchange for all | ---> layer code ---> tap | ...

Every pass is a thread, because the code around the taps is the family's own and cannot be cut. One runs at a time: a
baton goes from pass to pass until all of them wait at a tap. So the order of everything is fixed, and no module is
entered twice at once.

Shape letters: M token rows, K top-k, D width of what experts take.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class TapCall:
    """What a rank without tokens must know of a call of the experts, to take part in their exchange.

    Attributes:
        layer: MoE layer.
        top_k: K.
        width: D.
        dtype: of the hidden rows.
        weights_dtype: of the gate weights.
    """

    layer: int
    top_k: int
    width: int
    dtype: torch.dtype
    weights_dtype: torch.dtype

    @classmethod
    def of(cls, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> "TapCall":
        """Of the arguments of a tap."""
        return cls(layer, ids.shape[1], hidden.shape[1], hidden.dtype, weights.dtype)

    def empty(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden rows, ids and weights of no token."""
        return (
            torch.empty(0, self.width, dtype=self.dtype, device=device),
            torch.empty(0, self.top_k, dtype=torch.int64, device=device),
            torch.empty(0, self.top_k, dtype=self.weights_dtype, device=device),
        )


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A pass that waits at a tap."""

    layer: int
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


class _CancelledError(BaseException):
    """Ends a pass whose neighbour failed."""


class _Pass(threading.Thread, Generic[T]):
    """One forward pass; `advance` lets it run to its next tap or to its end."""

    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.waiting: _Waiting | None = None
        self.answer: torch.Tensor | None = None
        self.result: T | None = None
        self.error: BaseException | None = None
        self._cancelled = False
        self.start()

    def advance(self) -> None:
        """Called by the main thread."""
        self.waiting = None
        self._go.release()
        self._stopped.acquire()
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """End it where it waits."""
        self._cancelled = True
        self._go.release()
        self.join()

    def run(self) -> None:
        self._go.acquire()
        try:
            if not self._cancelled:
                with torch.inference_mode():  # of this thread
                    self.result = self._function()
        except _CancelledError:
            pass
        except BaseException as error:  # the main thread raises it
            self.error = error
        finally:
            self._stopped.release()

    def wait_at(self, waiting: _Waiting) -> torch.Tensor:
        """Called by the pass itself, at a tap: what the experts return."""
        self.waiting = waiting
        self._stopped.release()
        self._go.acquire()
        if self._cancelled:
            raise _CancelledError
        assert self.answer is not None
        answer, self.answer = self.answer, None
        return answer


def pause_at_tap(layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What taps call: hands the tokens to the lock step that runs the pass."""
    current: Any = threading.current_thread()
    assert isinstance(current, _Pass), "a model with taps runs in lock step only"
    return current.wait_at(_Waiting(layer, hidden, ids, weights))


def run_in_lock_step(
    functions: Sequence[Callable[[], T]],
    calls: Sequence[TapCall],
    sum_experts: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    device: torch.device,
) -> list[T]:
    """Run forward passes; their results.

    Args:
        functions: the passes of this rank, maybe none.
        calls: of the experts, in the order in which every pass makes them.
        sum_experts: called once per call with the tokens of all passes, one after the other.
        device: where tokens are.
    """
    passes = [_Pass(function) for function in functions]
    try:
        for one in passes:
            one.advance()
        for call in calls:
            _serve_call(passes, call, sum_experts, device)
    except BaseException:
        for one in passes:
            one.cancel()
        raise
    late = next((one.waiting for one in passes if one.waiting is not None), None)
    if late is not None:
        for one in passes:
            one.cancel()
        raise AssertionError(f"a pass called the experts of MoE layer {late.layer} once more than the pass before")
    return [one.result for one in passes]  # type: ignore[misc]


def _serve_call(passes: Sequence[_Pass[Any]], call: TapCall, sum_experts: Any, device: torch.device) -> None:
    waiting = [one.waiting for one in passes]
    if any(at is None or at.layer != call.layer for at in waiting):
        raise AssertionError(f"a pass did not call the experts of MoE layer {call.layer} as the pass before did")
    parts = [(at.hidden, at.ids, at.weights) for at in waiting if at is not None] or [call.empty(device)]
    hidden, ids, weights = (torch.cat(part) for part in zip(*parts, strict=True))
    sums = sum_experts(call.layer, hidden, ids, weights)
    for one, answer in zip(passes, sums.split([len(part[1]) for part in parts]), strict=False):
        one.answer = answer
        one.advance()
