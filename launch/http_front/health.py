"""HealthCheck: asks a service how it is, and waits for the answer no longer than is healthy."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from moeplace.profiling.errors import MoeplaceError
from moeplace.runtime.service.api import Service, ServiceStatus


class HealthCheck:
    """See the module. One question at a time: those who ask meanwhile wait for the same answer.

    Args:
        patience: seconds.
    """

    def __init__(self, service: Service, *, patience: float) -> None:
        self._service, self._patience = service, patience
        self._thread = ThreadPoolExecutor(1, "health")
        self._asked: asyncio.Future[ServiceStatus] | None = None

    async def status(self) -> ServiceStatus:
        """How the service is.

        Raises:
            MoeplaceError: it does not answer; says why.
        """
        if self._asked is None or self._asked.done():
            self._asked = asyncio.get_running_loop().run_in_executor(self._thread, self._service.status)
            self._asked.add_done_callback(lambda asked: asked.cancelled() or asked.exception())  # who asked has gone
        try:
            async with asyncio.timeout(self._patience):
                return await asyncio.shield(self._asked)
        except TimeoutError as error:
            raise MoeplaceError(f"the service has not answered for {self._patience:g} s") from error
        except Exception as error:
            raise MoeplaceError(f"the service does not answer: {error}") from error

    def close(self) -> None:
        """Ask nothing more; a question that was never answered is left alone."""
        self._thread.shutdown(wait=False, cancel_futures=True)
