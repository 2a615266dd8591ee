"""Train a small Mixture-of-Experts language model like the one that ships with the package.

    python examples/train_tiny_moe.py --out my-moe                             # Python's own source, 3,135 steps
    python examples/train_tiny_moe.py --out my-moe --text SRC DOCS --steps 200  # folders of text, one source each

Sources have equal shares in every batch. One file in twenty is held out: its text goes to OUT/held-out, and is what to
profile on. The checkpoint is a Hugging Face `OlmoeForCausalLM` in bfloat16. Training takes an hour or so on two cores.

Shape letters: B sequences, T tokens of a sequence, L layers, E experts, K top-k.
"""

import argparse
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

PRESETS: dict[str, dict[str, Any]] = {
    "top1": {"num_hidden_layers": 6, "hidden_size": 96, "num_key_value_heads": 2, "num_experts": 16,
             "num_experts_per_tok": 1, "norm_topk_prob": False},
    "top2": {"num_hidden_layers": 8, "hidden_size": 128, "num_key_value_heads": 4, "num_experts": 32,
             "num_experts_per_tok": 2, "norm_topk_prob": True},
}  # fmt: skip
BALANCE = {"top1": (0.02, True), "top2": (0.01, False)}  # weight of the balance loss; layer by layer or all together
EXPERT_HIDDEN, HEADS, VOCABULARY, POSITIONS = 96, 4, 4096, 512
SUFFIXES = {".py", ".rst", ".txt", ".md", ".h", ".c", ".tex", ".html"}
PEAK_RATE, WARM_UP, LAST_SHARE = 2e-3, 50, 0.05
HELD_OUT_BYTES = 120_000


def read_source(folder: Path, most_bytes: int) -> tuple[list[str], list[str]]:
    """Training and held-out texts of the files below a folder: one file in twenty is held out."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    train, held_out, size = [], [], 0
    for number, path in enumerate(files):
        text = path.read_text(encoding="utf-8", errors="ignore")
        (held_out if number % 20 == 19 else train).append(text)
        size += len(text)
        if size > most_bytes:
            break
    if not train:
        raise SystemExit(f"{folder} has no text files ({', '.join(sorted(SUFFIXES))})")
    return train, held_out


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<eos>", eos_token="<eos>", pad_token="<eos>")


def make_model(preset: str, vocabulary: int, seed: int) -> OlmoeForCausalLM:
    """A model with random weights."""
    torch.manual_seed(seed)
    config = OlmoeConfig(
        vocab_size=vocabulary,
        intermediate_size=EXPERT_HIDDEN,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **PRESETS[preset],
    )
    return OlmoeForCausalLM(config)


def record_routers(model: OlmoeForCausalLM) -> list[torch.Tensor]:
    """A list that every forward pass fills with (B T, E) router logits, layer by layer; the caller empties it."""
    found: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda module, inputs, output: found.append(_router_logits(module, inputs))
        )
    return found


def _router_logits(gate: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    hidden = inputs[0]
    return torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), gate.weight)


def balance_loss(logits: Sequence[torch.Tensor], top_k: int, *, per_layer: bool) -> torch.Tensor:
    """E times the sum over experts of (share of assignments) x (mean probability), 1 x K when all are equal.

    Args:
        logits: (B T, E) of each layer.
        top_k: K.
        per_layer: mean over layers of each layer's own loss; otherwise all layers count as one.
    """
    groups = list(logits) if per_layer else [torch.cat(list(logits))]
    losses = []
    for group in groups:
        probability = group.softmax(dim=1)
        chosen = torch.zeros_like(probability).scatter_(1, probability.topk(top_k, dim=1).indices, 1.0)
        losses.append(group.shape[1] * (chosen.mean(dim=0) * probability.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def draw_batch(sources: Sequence[np.ndarray], size: int, length: int, rng: np.random.Generator) -> torch.Tensor:
    """(B, T + 1) tokens: sequences at random places, every source in turn."""
    rows = []
    for number in range(size):
        tokens = sources[number % len(sources)]
        start = int(rng.integers(0, len(tokens) - length - 1))
        rows.append(tokens[start : start + length + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def train(model: OlmoeForCausalLM, sources: Sequence[np.ndarray], args: argparse.Namespace) -> float:
    """Train in place; returns the last loss in nats per token."""
    weight, per_layer = BALANCE[args.preset]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    rng = np.random.default_rng(args.seed)
    routed, loss = record_routers(model), torch.tensor(0.0)
    bar = trange(args.steps, desc="train", disable=None)
    for step in bar:
        warm = min((step + 1) / WARM_UP, 1.0)
        decay = 1 - (1 - LAST_SHARE) * step / max(args.steps, 1)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * warm * decay
        batch = draw_batch(sources, args.batch, args.length, rng)
        routed.clear()
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        balance = balance_loss(routed, model.config.num_experts_per_tok, per_layer=per_layer)
        optimizer.zero_grad()
        (loss + weight * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", balance=f"{balance.item():.3f}")
    return float(loss.item())


def main() -> None:
    """Read, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint folder to write")
    parser.add_argument("--text", type=Path, nargs="+", default=[stdlib], metavar="DIR", help="folders, one per source")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="top1")
    parser.add_argument("--steps", type=int, default=3135)
    parser.add_argument("--batch", type=int, default=32, help="sequences per step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--most-bytes", type=int, default=20_000_000, help="of each source (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pairs = [read_source(folder, args.most_bytes) for folder in args.text]
    share = max(args.most_bytes // 10, 1)
    tokenizer = train_tokenizer(["\n".join(texts)[:share] for texts, _ in pairs])
    sources = [np.array(tokenizer("\n".join(texts))["input_ids"], dtype=np.int32) for texts, _ in pairs]
    print(f"{sum(map(len, sources)):,} training tokens from {len(sources)} sources")
    model = make_model(args.preset, len(tokenizer), args.seed)
    loss = train(model, sources, args)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "held-out").mkdir(exist_ok=True)
    for folder, (_, held_out) in zip(args.text, pairs, strict=True):
        text = "\n".join(held_out).encode()[:HELD_OUT_BYTES].decode(errors="ignore")
        (args.out / "held-out" / f"{folder.name}.txt").write_text(text)
    print(f"loss {loss:.3f} after {args.steps} steps; wrote {args.out}")


if __name__ == "__main__":
    main()
