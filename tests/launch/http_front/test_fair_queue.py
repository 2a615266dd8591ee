"""Who comes next: limits, fair shares, deadlines, clients that go away; and the keys that say who a client is."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from moeplace.launch.http_front.fair_queue import FairQueue
from moeplace.launch.http_front.keys import Keys, read_client_keys
from moeplace.launch.http_front.settings import FrontSettings
from moeplace.launch.http_front.wire.errors import ApiError
from moeplace.launch.http_front.wire.metrics import FrontMetrics
from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.scheduler import Scheduler
from tests.launch.http_front.http_services import WAIT, ManualService, ThreadedFront, served, wait_until
from tests.runtime.engine.test_scheduler_fairness import Rows


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), WAIT))


async def settle() -> None:
    """Let every task do what it can."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_the_client_with_the_fewest_comes_first() -> None:
    """Whoever floods the queue waits behind who asks now and then, and loses nothing by it."""

    async def body() -> None:
        queue, order = FairQueue(2, 100), []

        async def ask(client: str) -> None:
            await queue.enter(client, 1, timeout=None)
            order.append(client)

        tasks = [asyncio.create_task(ask("greedy")) for _ in range(6)]
        await settle()
        tasks += [asyncio.create_task(ask("modest")) for _ in range(2)]
        await settle()
        assert order == ["greedy", "greedy"]
        for _ in range(6):
            queue.leave(order[len(order) - 2], 1)
            await settle()
        assert order == ["greedy", "greedy", "modest", "greedy", "modest", "greedy", "greedy", "greedy"]
        await asyncio.gather(*tasks)
        assert (queue.running, queue.waiting) == (2, 0)

    run(body)


def test_many_completions_are_not_passed_by() -> None:
    """A request of several waits for room for all of them, and small ones behind it wait with it."""

    async def body() -> None:
        queue, order = FairQueue(3, 100), []

        async def ask(name: str, choices: int) -> None:
            await queue.enter(name, choices, timeout=None)
            order.append(name)

        assert queue.enter_now("first", 2)
        tasks = [asyncio.create_task(ask("large", 3)), asyncio.create_task(ask("small", 1))]
        await settle()
        assert order == []
        assert not queue.enter_now("third", 1)
        queue.leave("first", 2)
        await settle()
        assert order == ["large"]
        queue.leave("large", 3)
        await asyncio.gather(*tasks)
        assert order == ["large", "small"]

    run(body)


@pytest.mark.parametrize("seed", [1, 2, "today"])
def test_nobody_is_lost_and_nobody_counts_twice(seed: int | str, dated_seed: int) -> None:
    """Requests that come, wait, give up and end at random: the limits hold, and all that stay get their turn."""
    rng = np.random.default_rng(dated_seed if seed == "today" else int(seed))

    async def body() -> None:
        queue, under_way, outcomes = FairQueue(5, 12), Counter[str](), Counter[str]()

        async def ask(client: str, choices: int, patience: float | None, work: int) -> None:
            try:
                await queue.enter(client, choices, timeout=patience)
            except ApiError as error:
                outcomes[str(error.status)] += 1
                return
            try:
                under_way[client] += choices
                assert under_way.total() <= queue.running <= 5  # whose turn has come may not know yet
                assert queue.waiting <= 12
                for _ in range(work):
                    await asyncio.sleep(0)
                outcomes["done"] += 1
            finally:
                under_way[client] -= choices
                queue.leave(client, choices)

        tasks = []
        for _ in range(200):
            patience = None if rng.random() < 0.5 else float(rng.random() / 1000)
            client, choices = str(rng.choice(list("abc"))), int(rng.integers(1, 4))
            tasks.append(asyncio.create_task(ask(client, choices, patience, int(rng.integers(8)))))
            if rng.random() < 0.3:
                tasks[int(rng.integers(len(tasks)))].cancel()
            for _ in range(int(rng.integers(5))):
                await asyncio.sleep(0)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(error, asyncio.CancelledError) for error in ended if error is not None), ended
        assert (queue.waiting, queue.running) == (0, 0)
        assert outcomes["done"] > 0

    run(body)


@pytest.mark.parametrize("most_overtaken", [0, 1, 3, 6])
def test_shares_stay_fair_where_alike_requests_go_first(most_overtaken: int) -> None:
    """Two clients who always ask; one's requests are alike and suit the batch, the other's are each like no other. Both
    have as many completions under way, and of the places the odd one gets what is promised: of 8 under way 4 are its
    own, and none of these waits for more than 8 + N others."""

    async def body() -> None:
        queue, ended = FairQueue(8, 100), Counter[str]()
        scheduler = Scheduler(
            num_ranks=1, rows=2, positions=16, replicated=False, max_prefill_tokens=64, most_overtaken=most_overtaken
        )
        rows, numbers, done = Rows(scheduler), itertools.count(), dict[str, asyncio.Event]()
        under_way = Counter[str]()

        async def ask(client: str) -> None:
            while True:
                await queue.enter(client, 1, timeout=None)
                under_way[client] += 1
                number = next(numbers)
                name = f"{client} {number}"
                scheduler.add(Request(name, (number % 50,) * 3, 2 + number % 3, stop_ids=()))
                done[name] = asyncio.Event()
                await done[name].wait()
                under_way[client] -= 1
                ended[client] += 1
                queue.leave(client, 1)

        tasks = [asyncio.create_task(ask(client)) for client in "ab" * 6]
        for step in range(600):
            await settle()
            if step:  # all have come
                assert under_way == {"a": 4, "b": 4}
            requests = scheduler.unforeseen()
            kinds = [0 if r.request_id[0] == "a" else 1 + int(r.request_id[2:]) % 20 for r in requests]
            scheduler.order.learn([r.request_id for r in requests], np.eye(21, dtype=np.int16)[kinds])
            before = {sequence.request.request_id for sequence in scheduler.running}
            rows.carry_out(scheduler.next_batch())
            for name in before - {sequence.request.request_id for sequence in scheduler.running}:
                done.pop(name).set()
        for task in tasks:
            task.cancel()
        assert min(ended.values()) / ended.total() >= 4 / (8 + most_overtaken) - 0.02
        if not most_overtaken:
            assert abs(ended["a"] - ended["b"]) <= 8

    run(body)


def post(front: ThreadedFront, token: str = "", **options: Any) -> httpx.Response:
    headers = {**({"Authorization": f"Bearer {token}"} if token else {}), **options}
    return httpx.post(f"{front.url}/v1/completions", json={"prompt": "a"}, headers=headers, timeout=WAIT)


def waiting(front: ThreadedFront, token: str = "") -> int:
    """How many wait, as the metrics say."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    lines = httpx.get(f"{front.url}/metrics", headers=headers, timeout=WAIT).text.splitlines()
    return int(float(next(line for line in lines if line.startswith("moeplace_completions_waiting ")).split()[1]))


def test_metrics_say_what_the_queue_says() -> None:
    """At the moment when they are asked for, however many have come since anything else happened."""

    async def body() -> None:
        queue = FairQueue(2, 100)
        metrics = FrontMetrics(ManualService(), queue)
        for running, waiting in ((1, 0), (2, 0), (2, 1), (2, 2), (2, 3)):
            task = asyncio.create_task(queue.enter("client", 1, timeout=None))
            tasks.append(task)
            await settle()
            text = metrics.render().decode()
            assert f"moeplace_completions_in_flight {running}.0\n" in text
            assert f"moeplace_completions_waiting {waiting}.0\n" in text
        queue.leave("client", 1)
        await settle()
        assert "moeplace_completions_waiting 2.0\n" in metrics.render().decode()
        for task in tasks:
            task.cancel()

    tasks: list[asyncio.Task[None]] = []
    run(body)


def test_those_who_wait_over_http() -> None:
    """They are answered when there is room, refused with 429 when too many wait, and forgotten when they go."""
    service = ManualService()
    with served(service, max_concurrent=1, max_queue=1) as front, ThreadPoolExecutor(3) as pool:
        first = pool.submit(post, front)
        running = service.next_request()
        second = pool.submit(post, front)
        wait_until(lambda: waiting(front) == 1)
        refused = post(front)
        assert (refused.status_code, int(refused.headers["retry-after"])) == (429, 1)
        service.give(running, "x", "length")
        service.give(service.next_request(), "y", "length")
        assert [answer.result(WAIT).json()["choices"][0]["text"] for answer in (first, second)] == ["x", "y"]
        first = pool.submit(post, front)
        running = service.next_request()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{front.url}/v1/completions", json={"prompt": "a"}, timeout=httpx.Timeout(WAIT, read=0.2))
        wait_until(lambda: waiting(front) == 0)
        service.give(running, "x", "length")
        assert first.result(WAIT).status_code == 200
        assert service.submitted.empty()


def test_deadlines() -> None:
    """In the queue 503, under way 504 and an end for the service's request; what a client wants is less at most."""
    service = ManualService()
    settings = {"max_concurrent": 1, "queue_timeout": 0.2, "request_timeout": WAIT}
    with served(service, **settings) as front, ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, front, **{"X-Request-Timeout": "2"})
        running = service.next_request()
        late = post(front)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "queue_timeout")
        assert (first.result(WAIT).status_code, first.result().json()["error"]["code"]) == (504, "deadline_exceeded")
        assert service.cancelled.get(timeout=WAIT) == running.request_id
        for value in ("0", "-1", "nan", "inf", "soon"):
            assert post(front, **{"X-Request-Timeout": value}).status_code == 400


def test_clients_by_their_keys(tmp_path: Path) -> None:
    """Each has a token of its own; the modest one is served before the rest of the greedy one's."""
    path = tmp_path / "keys"
    path.write_text("# who may\ngreedy token-1\n\nmodest token-2\n")
    service = ManualService()
    options = {"client_keys": read_client_keys(path), "max_concurrent": 1}
    with served(service, **options) as front, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(post, front, "token-1")]
        running = service.next_request()
        answers += [pool.submit(post, front, "token-1") for _ in range(2)]
        wait_until(lambda: waiting(front, "token-2") == 2)
        modest = pool.submit(post, front, "token-2")
        wait_until(lambda: waiting(front, "token-2") == 3)
        service.give(running, "x", "length")  # whoever has fewest comes next; of equals, who asked first
        texts = ["greedy", "modest", "greedy"]
        for text in texts:
            service.give(service.next_request(), text, "length")
        assert modest.result(WAIT).status_code == 200
        assert {answer.result(WAIT).status_code for answer in answers} == {200}
        assert post(front, "token-3").status_code == 401


@pytest.mark.parametrize("content", ["", "a", "a b c", "a t\na u", "a t\nb t", "a \xff", "anybody t"])
def test_bad_key_files(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(InputError, match="keys"):
        read_client_keys(path)


def test_the_administration_has_a_key_of_its_own() -> None:
    """Which opens nothing else, and which no client's token stands for; without one every token opens both."""
    keys = Keys("client", {"other": "token"}, "root")
    opened = [keys.opens_administration(f"Bearer {token}") for token in ("client", "token", "root", "")]
    assert opened == [False, False, True, False]
    assert [keys.client_of(f"Bearer {token}") for token in ("client", "token", "root")] == ["anybody", "other", None]
    assert Keys("client", {}, None).opens_administration("Bearer client")
    assert Keys(None, {}, None).client_of("") == "anybody"
    assert not Keys(None, {}, "root").opens_administration("")
    with pytest.raises(InputError, match="--admin needs a bearer token"):
        FrontSettings("toy", admin=True)
    with served(ManualService(), api_key="client", admin_key="root", admin=True) as front:
        for path, token, status in (
            ("/admin/status", "client", 401),
            ("/admin/status", "root", 200),
            ("/v1/models", "root", 401),
            ("/v1/models", "client", 200),
        ):
            headers = {"Authorization": f"Bearer {token}"}
            assert httpx.get(f"{front.url}{path}", headers=headers, timeout=WAIT).status_code == status
