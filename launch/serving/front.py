"""`moeplace serve --http` and `moeplace ray serve`: a service, and the HTTP front before it."""

import argparse
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeplace.launch.options.policy import tier_limits
from moeplace.launch.options.precision import chosen, describe_precision, inexact_sentence, served_plan
from moeplace.launch.options.replanning import replan_window
from moeplace.launch.serving.front_arguments import replica_rule_of

if TYPE_CHECKING:
    from moeplace.launch.http_front.settings import FrontSettings
    from moeplace.runtime.service.api import Service
    from moeplace.runtime.service.coordinator.coordinator import Coordinator
    from moeplace.runtime.service.options import ServiceOptions, Spawner


def serve_http(args: argparse.Namespace, start_service: "Callable[[], Service]") -> int:
    """Answer HTTP requests until a signal comes.

    Args:
        args: of both functions above, with `model` and `http`.
        start_service: called once the address is known to be free and the tokenizer is read.

    Raises:
        InputError: a value breaks a rule, or a library is missing.
    """
    from moeplace.launch.serving.event_logger import EventLogger
    from moeplace.launch.serving.logs import set_up_logs
    from moeplace.launch.serving.requests_file import Tokenizer
    from moeplace.profiling.extras import missing_package
    from moeplace.runtime.models.precisions.precision_checkpoint import open_checkpoint

    try:
        from moeplace.launch.http_front.administration import Permit
        from moeplace.launch.http_front.application import HttpFront
        from moeplace.launch.http_front.loading import answering_while_loading
        from moeplace.launch.http_front.server import address_of, bind, run_front
        from moeplace.launch.http_front.settings import parse_address
    except ModuleNotFoundError as error:
        raise missing_package("moeplace serve --http", error) or error from error
    plan = served_plan(args)
    settings = _settings(args, precision=describe_precision(plan))
    caveat = "" if plan is None else f" ({inexact_sentence(args, plan)})"
    replan_options = _replan_options(args) if args.replan else {}
    set_up_logs(args.log_format, access=args.access_log)
    with bind(*parse_address(args.http), settings) as listener:
        stop_ids = open_checkpoint(args.model, chosen(plan)).stop_ids
        tokenizer = Tokenizer(args.model)
        if tokenizer.exists:
            tokenizer.load()
        with ended_by_signals(), answering_while_loading(listener, **settings.tls_options):
            service = start_service()
        try:
            permit, coder = Permit(), tokenizer if tokenizer.exists else None
            front = HttpFront(service, settings, coder=coder, stop_ids=stop_ids, permit=permit)
            options = {**replan_options, "is_allowed": lambda: permit.replanning}
            with EventLogger(service), _replanning(args, service, options):
                run_front(
                    front,
                    listener,
                    settings,
                    on_ready=lambda: print(
                        f"serving {settings.model} on {address_of(listener, settings)}{caveat}", flush=True
                    ),
                )
        finally:
            service.close(drain=False, timeout=args.timeout)
    print("stopped")
    return 0


def _settings(args: argparse.Namespace, *, precision: Any) -> "FrontSettings":
    """What the front is told by its flags; keys come from files and the environment."""
    from moeplace.launch.http_front.keys import ADMIN_KEY_VARIABLE, read_api_key, read_client_keys
    from moeplace.launch.http_front.settings import FrontSettings

    return FrontSettings(
        model=args.model_name or Path(args.model).resolve().name,
        api_key=read_api_key(args.api_key_file),
        client_keys=read_client_keys(args.client_keys),
        admin_key=read_api_key(args.admin_key_file, ADMIN_KEY_VARIABLE),
        admin=args.admin,
        dashboard=args.dashboard,
        max_body_bytes=args.max_body_bytes,
        max_prompt_tokens=args.max_prompt_tokens,
        max_tokens=args.max_tokens,
        max_concurrent=args.max_concurrent,
        max_queue=args.max_queue,
        queue_timeout=args.queue_timeout,
        request_timeout=args.request_timeout,
        max_ranks=args.max_ranks,
        stall_timeout=args.stall_timeout,
        drain_grace=args.drain_grace,
        drain_timeout=args.drain_timeout,
        tls_certificate=args.tls_certificate,
        tls_key=args.tls_key,
        seed=args.seed,
        keeps_requests=bool(args.state),
        precision=precision,
    )


def require_log_folder(path: str | None) -> Path | None:
    """The folder of the ranks' logs, made where there is none.

    Raises:
        InputError: it cannot be.
    """
    from moeplace.profiling.errors import InputError

    if path is None:
        return None
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--log-dir {path} cannot be made: {error.strerror}") from error
    return Path(path)


def set_threads(threads: int | None) -> None:
    """Let the rank in this process use so many cores; None = all that it may."""
    import torch

    from moeplace.profiling.errors import InputError

    if threads is not None:
        if threads < 1:
            raise InputError(f"--threads-per-rank ({threads}) must be at least 1")
        torch.set_num_threads(threads)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While ranks start, SIGTERM ends them and this process in order, as Ctrl-C does."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # signals are not this thread's business
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _replan_options(args: argparse.Namespace) -> dict[str, Any]:
    """What re-placement needs to know beside the service; read before any rank starts."""
    from moeplace.launch.options.calibration import calibration_for
    from moeplace.placement.cost.steps import StepShape
    from moeplace.profiling.model_facts import facts_of
    from moeplace.profiling.traces.file import load_trace
    from moeplace.runtime.models.checkpoint import Checkpoint

    facts, nominal = facts_of(Checkpoint(args.model).config), StepShape()
    shape = StepShape(
        batch=args.max_sequences,
        hidden_size=facts.hidden_size or nominal.hidden_size,
        kv_dim=facts.kv_dim or nominal.kv_dim,
    )
    return {
        "shape": shape,
        "calibration": calibration_for(args, facts, shape, args.ranks),
        "reference": load_trace(args.trace) if args.trace else None,
        "seed": args.seed,
    }


def _replanning(
    args: argparse.Namespace, service: "Service", options: Mapping[str, Any]
) -> AbstractContextManager[object]:
    """The service re-places its experts while this is open, if the flags say so."""
    from moeplace.launch.options.replanning import replanning
    from moeplace.runtime.service.coordinator.coordinator import Coordinator

    if not args.replan or not isinstance(service, Coordinator):
        return nullcontext()
    return replanning(args, service, **options)


def start_coordinator(args: argparse.Namespace, spawner: "Spawner", *, host: str) -> "Coordinator":
    """A service of `args.ranks` members that takes requests; a member that is lost is replaced.

    Args:
        host: address of this process that members can reach.

    Raises:
        MoeplaceError: it does not come up.
    """
    from moeplace.placement.placement_file import load_placement
    from moeplace.runtime.service.coordinator.coordinator import Coordinator

    verify_alone(args)
    options = _service_options(args)
    placement = load_placement(args.placement) if args.placement else None
    service = Coordinator(
        args.model,
        ranks=args.ranks,
        spawner=spawner,
        options=options,
        placement=placement,
        host=host,
        state=args.state,
    )
    try:
        service.wait_until_serving(timeout=options.start_timeout)
    except BaseException:
        service.close(drain=False)
        raise
    return service


def verify_alone(args: argparse.Namespace) -> None:
    """Before ranks are started: serve the verification's sequences on one rank, in this process.

    Raises:
        InputError: their logits are not the plain model's.
    """
    import torch

    from moeplace.runtime.engine.engine import Engine
    from moeplace.runtime.engine.limits import EngineLimits
    from moeplace.runtime.engine.verification import needs_verification, verify_engine
    from moeplace.runtime.models.checkpoint import Checkpoint

    checkpoint = Checkpoint(args.model)
    if args.verify if args.verify is not None else needs_verification(checkpoint.model_type):
        dtype = getattr(torch, args.dtype) if args.dtype else None
        verify_engine(Engine(checkpoint, mode="allgather", dtype=dtype, limits=EngineLimits(max_sequences=4)))


def _absolute(path: str | None) -> str | None:
    """As processes that start elsewhere find it."""
    return None if path is None else str(Path(path).resolve())


def _service_options(args: argparse.Namespace) -> "ServiceOptions":
    from moeplace.runtime.engine.limits import EngineLimits
    from moeplace.runtime.service.options import ServiceOptions

    return ServiceOptions(
        mode=args.mode,
        trace=_absolute(args.trace) if args.mode == "auto" else None,
        calibration=_absolute(args.calibration),
        dtype=args.dtype,
        limits=EngineLimits(
            max_sequences=args.max_sequences,
            max_length=args.max_length,
            kv_bytes=args.kv_bytes,
            max_prefill_tokens=args.max_prefill_tokens,
            reuses_prefixes=args.prefix_reuse,
            alike=args.alike,
            tiers=tier_limits(args),
            staging_rows=1,
            recent_ids=replan_window(args),
        ),
        node_aware=args.node_aware,
        replica_rule=replica_rule_of(args),
        timeout=args.timeout,
        start_timeout=args.start_timeout,
        keep_width=True,
        probe_tokens=args.probe_tokens,
        threads=args.threads_per_rank or 1,
        device=args.device,
        precision=chosen(served_plan(args)),
    )
