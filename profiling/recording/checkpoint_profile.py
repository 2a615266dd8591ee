"""Profiles a checkpoint: loads it from a folder, runs texts through it, records the routing into a trace file."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeplace.profiling.errors import FormatError, InputError, MoeplaceError
from moeplace.profiling.files import require_file
from moeplace.profiling.recording.checkpoint_files import check_checkpoint
from moeplace.profiling.recording.corpus import Tokenize, estimate_tokens, token_sequences
from moeplace.profiling.recording.experts_modules import find_experts
from moeplace.profiling.recording.model_config import foreign_config, no_experts, read_model_config
from moeplace.profiling.recording.plain_model import load_plain_model
from moeplace.profiling.recording.quantised.quantisation import NotReadableError, Quantisation, not_readable
from moeplace.profiling.recording.recorder import Recorder
from moeplace.profiling.recording.routing_sources import find_sources
from moeplace.profiling.recording.stored_tensors import StoredTensors
from moeplace.profiling.recording.target_names import stored_expert_bytes

_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def load_model(folder: str | Path, *, device: str = "cpu") -> tuple[torch.nn.Module, Tokenize]:
    """A checkpoint's model, in evaluation mode on `device`, and its tokenizer as a function.

    Only local safetensors are read, no code of the checkpoint runs, and no parameter is left at random.

    Raises:
        InputError: there is no such folder, the model is dense, or there is no such device.
        FormatError: files are missing, truncated, or of another model.
    """
    path = check_checkpoint(folder)
    import safetensors  # noqa: F401  # where it is missing transformers blames the configuration instead
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = read_model_config(path)
    _check_architecture(path, config)
    target = _device(device)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **_LOCAL)
    except Exception as error:
        raise FormatError(f"{path} has no readable tokenizer: {_line(error)}") from error

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    return _read_weights(path, config).eval().to(target), tokenize


def _check_architecture(path: Path, config: Any) -> None:
    """Refuse a configuration that is not an MoE language model, before any weight is read."""
    import transformers

    try:
        with torch.device("meta"):
            skeleton = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a foreign configuration can fail anywhere in transformers
        raise foreign_config(path, error) from error
    if not find_sources(skeleton):
        raise no_experts(str(path), skeleton)
    try:
        Quantisation.of(config)
    except NotReadableError as error:
        raise InputError(f"{path} cannot be profiled (because {not_readable(error)})") from error


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} is not available: {_line(error)}") from error
    return device


def _read_weights(path: Path, config: Any) -> torch.nn.Module:
    """The model with all its weights from the files: none missing, none of another shape."""
    try:
        model, info = load_plain_model(path, config)
    except MoeplaceError:
        raise
    except Exception as error:
        raise FormatError(f"the weights of {path} do not fit its config.json: {_line(error)}") from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise FormatError(
            f"the weights of {path} do not fit its config.json: {len(missing)} missing, first {missing[0]}"
        )
    return model


def profile_checkpoint(
    folder: str | Path,
    texts: Sequence[str | Path],
    out: str | Path,
    *,
    sequence_length: int = 128,
    batch_size: int = 16,
    max_tokens: int | None = None,
    device: str = "cpu",
    gate_accuracy: str | Path | None = None,
    progress: bool = False,
) -> int:
    """Run a checkpoint over text files and record its routing; every file is one workload tag.

    Args:
        folder: checkpoint folder.
        texts: text files.
        out: trace file to write.
        sequence_length: tokens per sequence; consecutive pieces of a file.
        batch_size: sequences per forward pass.
        max_tokens: tokens taken of each file at most.
        device: torch device.
        gate_accuracy: JSON file for the cross-layer gate accuracy, or None not to measure it.
        progress: show a progress bar on standard error.

    Returns:
        Tokens recorded.

    Raises:
        InputError: an argument breaks a rule, or a text is missing or empty.
        FormatError: the checkpoint is damaged or foreign.
    """
    for name, value, least in (("sequence length", sequence_length, 2), ("batch size", batch_size, 1)):
        if value < least:
            raise InputError(f"{name} ({value}) must be at least {least}")
    if max_tokens is not None and max_tokens < 2:
        raise InputError(f"max tokens ({max_tokens}) must be at least 2")
    for text in texts:
        if require_file(text).stat().st_size == 0:
            raise InputError(f"text file {text} is empty: there is nothing to profile on")
    model, tokenize = load_model(folder, device=device)
    _check_length(model, folder, sequence_length)
    names = [Path(text).stem for text in texts]
    names = names if len(set(names)) == len(names) else [str(text) for text in texts]
    measure = gate_accuracy is not None
    from tqdm import tqdm

    total = sum(estimate_tokens(text, tokenize, max_tokens) for text in texts)
    recorder = Recorder(
        model,
        out,
        workload_names=names,
        name=Path(folder).resolve().name,
        expert_bytes=_bytes_on_disk(Path(folder), model),
        gate_accuracy=measure,
    )
    with (
        torch.inference_mode(),
        recorder,
        tqdm(total=total, unit="token", desc="profile", disable=not progress) as bar,
    ):
        for recorder.workload, text in enumerate(texts):
            sequences = token_sequences(text, tokenize, length=sequence_length, max_tokens=max_tokens)
            for batch in _batches(sequences, batch_size):
                _check_vocabulary(model, folder, batch)
                model(input_ids=torch.from_numpy(batch).to(device), use_cache=False, logits_to_keep=1)
                bar.update(batch.size)
    if gate_accuracy is not None and recorder.gate_accuracy is not None:
        recorder.gate_accuracy.save(gate_accuracy, Path(folder).resolve().name)
    return recorder.num_tokens


def _bytes_on_disk(folder: Path, model: Any) -> np.ndarray | None:
    """(L,) bytes of an expert of a quantised checkpoint, which the model has unpacked; None = the model's own."""
    quantisation = Quantisation.of(read_model_config(folder))
    if not quantisation.method:
        return None
    return stored_expert_bytes(model, find_experts(model), StoredTensors(folder, quantisation))


def _batches(sequences: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Arrays (rows, length) of sequences of one length; the last sequence of a file may be shorter and goes alone."""
    while batch := list(islice(sequences, size)):
        if len(batch[-1]) != len(batch[0]):
            if len(batch) > 1:
                yield np.stack(batch[:-1])
            yield batch[-1][None]
        else:
            yield np.stack(batch)


def _check_length(model: Any, folder: str | Path, length: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise InputError(f"sequence length ({length}) must not exceed the {limit} positions of {folder}")


def _check_vocabulary(model: Any, folder: str | Path, batch: np.ndarray) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if batch.max() >= rows:
        raise FormatError(f"the tokenizer of {folder} gives id {batch.max()}, the model has {rows} embeddings")


def _line(error: Exception) -> str:
    """First line of an error of a library, short."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text[:200]
