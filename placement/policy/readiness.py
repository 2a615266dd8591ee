"""Compiled kernels without a pause: they are compiled by a process of their own while a thread waits for it.

An engine's first call must not stand still for a compiler, and Numba's compiler holds the interpreter lock. So the
first call starts a thread; the thread has the kernels compiled if this installation never did that, then loads them.
Nothing starts when the module is imported, nothing survives a fork: an engine forks its workers after it has loaded
its plug-ins.
"""

import os
import threading


class Kernels:
    """The kernels of the policy in this process: not asked for, being loaded, ready, or failed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._known = threading.Event()  # whether there is something to compile
        self._compiled = False
        self._ready = False
        self.failure: str | None = None

    def start(self) -> None:
        """Begin to load them, unless that was done."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._load, name="moeplace-kernels", daemon=True)
                self._thread.start()

    def ready(self, *, wait: bool) -> bool:
        """Whether they can be used now. Loads what is compiled; for the compiler it waits only if told to."""
        if self._ready:
            return True
        self.start()
        assert self._thread is not None
        self._known.wait()
        if wait or self._compiled:
            self._thread.join()
        return self._ready

    def _load(self) -> None:
        try:
            from moeplace.profiling.kernel_cache import POLICY_WARM_UP, compile_once, is_compiled

            self._compiled = is_compiled(POLICY_WARM_UP)
            self._known.set()
            compile_once(POLICY_WARM_UP)
            from moeplace.placement.policy.warm_up import use_kernels

            use_kernels()
            self._ready = True
        except Exception as error:  # an engine goes on with the map it has
            self.failure = f"{type(error).__name__}: {error}"
        finally:
            self._known.set()


class _OfThisProcess:
    """A thread does not survive a fork: the child begins anew."""

    kernels = Kernels()


def kernels() -> Kernels:
    """Of this process."""
    return _OfThisProcess.kernels


def _begin_anew() -> None:
    _OfThisProcess.kernels = Kernels()


os.register_at_fork(after_in_child=_begin_anew)
