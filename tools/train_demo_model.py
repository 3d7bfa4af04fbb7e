"""Train the model that `dither demo` quantises.

A small Llama (grouped-query attention, tied embeddings, every linear layer a multiple of 256 on both
sides, so that K-quants apply without fallbacks) learnt from public-domain books.  One file, one
command, a CPU is enough; the run is seeded and resumes from its last checkpoint:

    python tools/train_demo_model.py --train train.txt.xz --valid valid.txt.xz --work /tmp/run -o OUT

Matrices are trained with Muon (Jordan et al., 2024: momentum orthogonalised by a Newton-Schulz
iteration), everything else with AdamW.  The learning rate is constant after a warm-up and falls
linearly to zero over the last part of the run, so that `--steps` may be changed while it runs.

Shapes: B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 512
MICRO_BATCH = 2048  # tokens


def read_text(path: Path) -> str:
    raw = path.read_bytes()
    return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")


def train_tokenizer(text: str, path: Path) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenizer, learnt from an even sample of the books."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    pieces = [text[i : i + 20_000] for i in range(0, len(text), 100_000)]
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.save(str(path))
    return tokenizer


def tokenize(tokenizer: Tokenizer, text: str, path: Path) -> np.ndarray:
    """Token ids of `text` as uint16, cached at `path`; books are separated by the end token."""
    if path.exists():
        return np.load(path, mmap_mode="r")
    books = [book.strip() for book in text.split(END) if book.strip()]
    end = tokenizer.token_to_id(END)
    ids: list[np.ndarray] = []
    for encoded in tokenizer.encode_batch(books):
        ids.append(np.array([end, *encoded.ids], dtype=np.uint16))
    tokens = np.concatenate(ids)
    np.save(path, tokens)
    return tokens


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.02,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():  # residual branches start at zero: stable high rates
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(weight)
    return model


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Newton-Schulz quintic), scaled to the matrix's aspect ratio."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                velocity = state.setdefault("velocity", torch.zeros_like(weight))
                velocity.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalize(weight.grad.lerp(velocity, group["momentum"]))
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * scale)


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def learning_rate(step: int, steps: int, warmup: int = 50, cooldown: float = 0.4) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return min(1.0, max(0.0, (steps - step) / (steps * cooldown)))


def token_windows(tokens: np.ndarray, starts, context: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([tokens[s : s + context + 1] for s in starts]).astype(np.int64))


@torch.no_grad()
def validation_loss(model, tokens: np.ndarray, sequences: int, context: int = CONTEXT) -> float:
    """Mean next-token cross-entropy in nats over evenly spaced windows."""
    model.eval()
    starts = np.linspace(0, len(tokens) - context - 1, sequences).astype(int)
    total = 0.0
    for i in range(0, sequences, 16):
        batch = token_windows(tokens, starts[i : i + 16], context)
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1), reduction="sum"
        )
        total += loss.item()
    model.train()
    return total / (sequences * context)


def save_model(model, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    twin = LlamaForCausalLM(model.config).to(torch.bfloat16)
    twin.load_state_dict(model.state_dict())
    twin.config.use_cache = True
    twin.save_pretrained(out)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("backend", None)  # a name that every version of transformers knows
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n")
    (out / "model.safetensors").chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="tokenizer, tokens, checkpoints")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's rate; AdamW's is a quarter")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="bf16 products (pays where the CPU has AMX)")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    train_text = read_text(args.train) if not (args.work / "train.npy").exists() else ""
    tokenizer = train_tokenizer(train_text, args.work / "tokenizer.json")
    train = tokenize(tokenizer, train_text, args.work / "train.npy")
    valid_text = read_text(args.valid)
    valid = tokenize(tokenizer, valid_text, args.work / "valid.npy")
    del train_text

    model = build_model()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        Muon(matrices, lr=args.lr),
        torch.optim.AdamW(rest, lr=args.lr / 4, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0),
    ]
    rates = [[g["lr"] for g in o.param_groups] for o in optimizers]
    first, checkpoint = 0, args.work / "checkpoint.pt"
    log: list[dict] = []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first, log = saved["step"], saved["log"]
        print(f"resuming at step {first}", flush=True)
    print(f"{model.num_parameters():,} parameters, {len(train):,} training tokens", flush=True)

    def save_checkpoint(step: int) -> None:
        state = {
            "step": step,
            "model": model.state_dict(),
            "log": log,
            "optimizers": [o.state_dict() for o in optimizers],
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    def loss_of(batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits = model(batch[:, :-1]).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    clock = time.monotonic()
    for step in range(first, args.steps):
        scale = learning_rate(step, args.steps)
        for optimizer, base in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * scale
        picks = np.random.default_rng((args.seed, step))  # a resumed run sees the same windows
        context = CONTEXT // 2 if step < 0.75 * args.steps else CONTEXT  # short first: cheaper tokens
        starts = picks.integers(0, len(train) - context - 1, args.batch * CONTEXT // context)
        parts = np.array_split(starts, args.batch * CONTEXT // MICRO_BATCH)
        loss = 0.0
        for part in parts:  # small parts stay in cache
            share = loss_of(token_windows(train, part, context)) / len(parts)
            share.backward()
            loss += share.item()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step + 1 == args.steps:
            speed = (step - first + 1) * args.batch * CONTEXT / (time.monotonic() - clock)
            left = (args.steps - step - 1) * args.batch * CONTEXT / speed
            print(f"step {step:5d}  loss {loss:.4f}  {speed:,.0f} tok/s  {left / 60:.0f} min left", flush=True)
        if (step + 1) % 200 == 0:
            entry = {"step": step + 1, "valid_loss": validation_loss(model, valid, 64)}
            log.append(entry)
            print(json.dumps(entry), flush=True)
            save_checkpoint(step + 1)
    save_checkpoint(args.steps)
    save_model(model, tokenizer, args.out)
    final = validation_loss(model, valid, 512)
    per_byte = final * len(valid) / len(valid_text.encode()) / math.log(2)
    print(json.dumps({"valid_loss": final, "bits_per_byte": per_byte, "log": log}))


if __name__ == "__main__":
    main()
