"""What is asked of an engine, what runs there, and what comes of it: requests, sequences, completions."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, Self

from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.logprobs import MOST, TokenLogprob
from moeplace.runtime.engine.sampling import GREEDY, SamplingParameters
from moeplace.runtime.kv.row_pool import Prefix


@dataclass(frozen=True)
class Request:
    """What a user wants completed.

    Attributes:
        request_id: a name, unique among the requests in flight.
        token_ids: the prompt.
        max_new_tokens: most tokens to add.
        sampling: how to choose them.
        stop_ids: token ids that end the completion; None = the model's.
        logprobs: log-probabilities of the tokens are wanted, and of this many of the likeliest; None = they are not.
        note: whatever who asks wants to be kept with it; a service's ranks never see it.

    Raises:
        InputError: the prompt is empty, or a value is out of range.
    """

    request_id: str
    token_ids: tuple[int, ...]
    max_new_tokens: int = 64
    sampling: SamplingParameters = GREEDY
    stop_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", tuple(int(token) for token in self.token_ids))
        if not self.token_ids:
            raise InputError(f"request {self.request_id!r} has an empty prompt; at least one token is needed")
        if self.max_new_tokens < 1:
            raise InputError(f"request {self.request_id!r}: max_new_tokens ({self.max_new_tokens}) must be at least 1")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST:
            raise InputError(f"request {self.request_id!r}: logprobs ({self.logprobs}) must lie in 0..{MOST}")

    @property
    def length_limit(self) -> int:
        """Most positions its sequence can take."""
        return len(self.token_ids) + self.max_new_tokens

    @cached_property
    def stop_set(self) -> frozenset[int] | None:
        """`stop_ids`, for look-ups: there may be many."""
        return None if self.stop_ids is None else frozenset(self.stop_ids)

    def require_fit(self, *, positions: int, vocabulary: int | None = None) -> None:
        """Check against what an engine can hold; `vocabulary` None = the token ids are checked elsewhere.

        Raises:
            InputError: it can never fit, or a token id is out of range.
        """
        if self.length_limit > positions:
            raise InputError(
                f"request {self.request_id!r} needs {self.length_limit} positions (prompt {len(self.token_ids)} + "
                f"max_new_tokens {self.max_new_tokens}), but the K/V cache holds at most {positions} per sequence"
            )
        if vocabulary is not None:
            self.require_tokens(vocabulary)

    def require_tokens(self, vocabulary: int) -> None:
        """Check the ids of the prompt.

        Raises:
            InputError: one is out of range.
        """
        wrong = next((token for token in self.token_ids if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise InputError(
                f"request {self.request_id!r} has the token id {wrong}, which must lie in 0..{vocabulary - 1}"
            )

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """From plain data, as `to_json` gives it."""
        stop_ids = document.get("stop_ids")
        return cls(
            request_id=str(document["request_id"]),
            token_ids=tuple(document["token_ids"]),
            max_new_tokens=int(document["max_new_tokens"]),
            sampling=SamplingParameters(**document["sampling"]),
            stop_ids=None if stop_ids is None else tuple(stop_ids),
            logprobs=document.get("logprobs"),
            note=str(document.get("note", "")),
        )


@dataclass(frozen=True)
class Completion:
    """What came of a request.

    Attributes:
        request_id: its name.
        token_ids: the tokens added, the stopping one included.
        finish_reason: "stop" = a stop id came; "length" = max_new_tokens reached.
        logprobs: of each token, None = it is not known; empty where the request did not ask for them.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    logprobs: tuple[TokenLogprob | None, ...] = ()


@dataclass(eq=False)
class RunningSequence:
    """A request that has a place.

    Attributes:
        request: what it serves.
        home: rank that keeps its attention state.
        row: its row in the K/V cache.
        token_ids: prompt and what was added so far.
        cached: positions whose K/V exist (at home). No token is drawn before those behind it have run: the rest of a
            prompt, or what a change of ranks left to be made again.
        replicated: positions whose K/V exist on every rank.
        prefix: what its next pass takes over from a row, before it runs what follows; None = nothing.
        logprobs: index among the added tokens -> log-probabilities, where the request wants them.
    """

    request: Request
    home: int
    row: int
    token_ids: list[int] = field(default_factory=list)
    cached: int = 0
    replicated: int = 0
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    prefix: Prefix | None = None

    @property
    def added(self) -> tuple[int, ...]:
        return tuple(self.token_ids[len(self.request.token_ids) :])

    @property
    def num_missing(self) -> int:
        """Tokens that have to run before the next one is drawn."""
        return len(self.token_ids) - self.start

    @property
    def start(self) -> int:
        """Position from which on its next pass runs tokens."""
        return self.cached if self.prefix is None else self.prefix.positions

    @property
    def num_added(self) -> int:
        return len(self.token_ids) - len(self.request.token_ids)

    def finish_reason(self, stop_ids: Collection[int]) -> Literal["stop", "length"] | None:
        """Why it ends now, None = it goes on; `stop_ids` are the model's."""
        stops = stop_ids if self.request.stop_set is None else self.request.stop_set
        if self.num_added and self.token_ids[-1] in stops:
            return "stop"
        return "length" if self.num_added >= self.request.max_new_tokens else None
