"""RaySpawner: members of a service as Ray actors, each in a placement group of its own.

A placement group is reserved whole and cannot be resized, so a unit that may come or go needs one to itself. When an
actor is lost, its bundle is kept for a while: the member that follows it starts there, at once, where its predecessor
was. A member that leaves in order gives its bundle back.
"""

import logging
import os
import threading
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moeplace.runtime.service.options import MemberJob
from moeplace.runtime.service.spawner import member_environment

logger = logging.getLogger(__name__)

_LOST = -9


class RankActor:
    """One rank: runs a member until it ends."""

    def run(self, job: dict[str, Any]) -> int:
        """The member's exit code."""
        from moeplace.runtime.service.member.loop import run_member

        return run_member(MemberJob.from_json(job))

    def process_id(self) -> int:
        """Of the actor; to be asked before `run`, which takes the actor for itself."""
        return os.getpid()


@dataclass(eq=False)
class Bundle:
    """A placement group of one bundle, and the timer that gives it back while nobody is in it."""

    group: PlacementGroup
    timer: threading.Timer | None = None


class RayMember:
    """An actor that runs a member.

    Attributes:
        member_id: its number.
        bundle: where it runs.
    """

    def __init__(self, spawner: "RaySpawner", member_id: int, actor: Any, bundle: Bundle, job: MemberJob) -> None:
        self.member_id, self.bundle = member_id, bundle
        self._spawner, self._actor = spawner, actor
        self._process = actor.process_id.remote()
        self._result = actor.run.remote(job.to_json())
        self._lock = threading.Lock()
        self._code: int | None = None

    @property
    def pid(self) -> int:
        """Its process id, on its node; waits until it has started."""
        return int(ray.get(self._process))

    def is_alive(self) -> bool:
        """See `Member`."""
        return self.wait(0) is None

    def has_started(self) -> bool:
        """See `Member`: until then the cluster has no room for it."""
        return bool(ray.wait([self._process], timeout=0)[0])

    def last_words(self) -> str:
        """See `Member`: Ray keeps them."""
        return ""

    def release(self) -> None:
        """See `Member`."""
        self._spawner.forget(self)

    def kill(self) -> None:
        """See `Member`."""
        ray.kill(self._actor, no_restart=True)

    def wait(self, timeout: float) -> int | None:
        """See `Member`."""
        done, _ = ray.wait([self._result], timeout=timeout)
        if not done:
            return None
        with self._lock:
            if self._code is None:
                self._code = self._read_code()
                self._spawner.vacate(self.bundle, lost=self._code != 0)
        return self._code

    def _read_code(self) -> int:
        try:
            code = int(ray.get(self._result))
        except ray.exceptions.RayActorError:
            return _LOST
        except ray.exceptions.RayError as error:
            logger.error("member %d failed: %s", self.member_id, str(error).strip().splitlines()[-1])
            code = 1
        ray.kill(self._actor, no_restart=True)  # threads of its groups may live on, and hold the process
        return code


class RaySpawner:
    """Starts actors. Ray must be connected.

    Args:
        cpus: reserved for a rank.
        gpus: reserved for a rank.
        hold: seconds for which the bundle of a lost actor is kept for its successor.
    """

    def __init__(self, *, cpus: float = 1.0, gpus: float = 0.0, hold: float = 60.0) -> None:
        self._resources = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
        self._options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "max_concurrency": 1}
        self._hold = hold
        self._lock = threading.Lock()
        self._vacant: list[Bundle] = []
        self._members: list[RayMember] = []
        self._closed = False

    def start(self, member_id: int, job: MemberJob) -> RayMember:
        """See `Spawner`. Where the cluster has no room, the member starts when it has."""
        bundle = self._take_bundle()
        strategy = PlacementGroupSchedulingStrategy(bundle.group, placement_group_bundle_index=0)
        environment = {"env_vars": member_environment(job.host)}
        actor = ray.remote(RankActor).options(
            **self._options, scheduling_strategy=strategy, runtime_env=environment, name=None
        )
        member = RayMember(self, member_id, actor.remote(), bundle, job)
        with self._lock:
            self._members.append(member)
        return member

    def vacate(self, bundle: Bundle, *, lost: bool) -> None:
        """The member of a bundle has ended: keep the bundle for its successor if it was lost, else give it back."""
        with self._lock:
            if lost and not self._closed:
                bundle.timer = threading.Timer(self._hold, self._give_back, (bundle,))
                bundle.timer.daemon = True
                bundle.timer.start()
                self._vacant.append(bundle)
                return
        remove_placement_group(bundle.group)

    def forget(self, member: RayMember) -> None:
        """A member has ended, and nothing more is asked of it."""
        with self._lock:
            if member in self._members:
                self._members.remove(member)

    def close(self) -> None:
        """See `Spawner`."""
        with self._lock:
            self._closed = True
            vacant, self._vacant = self._vacant, []
            members = list(self._members)
        for member in members:
            if member.is_alive():
                member.kill()
                remove_placement_group(member.bundle.group)
        for bundle in vacant:
            if bundle.timer is not None:
                bundle.timer.cancel()
            remove_placement_group(bundle.group)

    def _take_bundle(self) -> Bundle:
        with self._lock:
            if self._vacant:
                bundle = self._vacant.pop()
                assert bundle.timer is not None
                bundle.timer.cancel()
                return bundle
        return Bundle(placement_group([dict(self._resources)], strategy="PACK"))

    def _give_back(self, bundle: Bundle) -> None:
        with self._lock:
            if bundle not in self._vacant:
                return
            self._vacant.remove(bundle)
        remove_placement_group(bundle.group)
