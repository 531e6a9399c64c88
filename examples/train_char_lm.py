"""Train a small character model with PyTorch, its attention by anyattn; compare with PyTorch's own attention.

    python examples/train_char_lm.py                                       # on the GPU if there is one
    python examples/train_char_lm.py --attention both --plot loss.png      # the same run twice, both curves drawn

Both runs start from the same parameters and see the same batches, so that their loss curves lie on each other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import anyattn

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v and the result: (batch, sequence, heads, head dim)


def anyattn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = anyattn.attention(q, k, v, causal=True)
    return out


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # PyTorch wants (batch, heads, sequence, head dim)
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


ATTENTIONS: dict[str, Attention] = {"anyattn": anyattn_attention, "torch": torch_attention}


class Block(nn.Module):
    def __init__(self, width: int, heads: int, attention: Attention) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        # [batch, sequence, 3, heads, head dim]: q, k and v are strided views, which anyattn reads where they lie
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.project(self.attention(q, k, v).flatten(2))
        return x + self.mlp(self.norm_mlp(x))  # type: ignore[no-any-return]


class CharLM(nn.Module):
    """A decoder-only transformer: character indices (batch, sequence) in, logits (batch, sequence, vocabulary) out."""

    def __init__(
        self, vocabulary: int, context: int, width: int, heads: int, layers: int, attention: Attention
    ) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, attention) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.token(indices) + self.position.weight[: indices.shape[1]]
        return self.head(self.norm(self.blocks(x)))  # type: ignore[no-any-return]


class TrainingStep:
    """One step of training: the loss of a batch, its gradients, the optimizer's update.

    On a GPU a small model computes for less time than Python takes to ask for it. So after a few steps, one is captured
    in a CUDA graph, which a single launch replays from then on.
    """

    WARM_UP = 3  # steps that load kernels and make the optimizer's state, which a capture can't

    def __init__(self, model: CharLM, learning_rate: float, batch: int, context: int, device: torch.device) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, capturable=device.type == "cuda")
        self.windows = torch.empty(batch, context + 1, dtype=torch.int64, device=device)  # a graph reads it in place
        self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream: Any = None  # PyTorch captures no default stream
        if device.type == "cuda":
            self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def __call__(self, windows: Tensor) -> float:
        """Train on characters (batch, context + 1); returns the mean cross-entropy of the next character, in nats."""
        with torch.cuda.stream(self.stream):
            self.windows.copy_(windows)
            if self.graph is None or self.steps < self.WARM_UP:
                self.loss = self.compute()
            else:
                if self.steps == self.WARM_UP:
                    with torch.cuda.graph(self.graph, stream=self.stream):
                        self.loss = self.compute()
                self.graph.replay()
            self.steps += 1
            return self.loss.item()

    def compute(self) -> Tensor:
        self.optimizer.zero_grad()
        logits = self.model(self.windows[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), self.windows[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss


def train(
    text: str,
    attention: Attention,
    *,
    steps: int = 300,
    batch: int = 16,
    context: int = 128,
    width: int = 128,
    heads: int = 4,
    layers: int = 2,
    learning_rate: float = 1e-3,
    device: str = "cpu",
    seed: int = 0,
) -> Iterator[float]:
    """Train on `text` and yield each step's loss."""
    torch.manual_seed(seed)
    characters = {character: index for index, character in enumerate(sorted(set(text)))}
    data = torch.tensor([characters[character] for character in text])
    model = CharLM(len(characters), context, width, heads, layers, attention).to(device)
    step = TrainingStep(model, learning_rate, batch, context, torch.device(device))
    windows = data.unfold(0, context + 1, 1)  # every stretch of context + 1 characters, without a copy
    for _ in range(steps):
        yield step(windows[torch.randint(len(windows), (batch,))])


def draw(curves: Mapping[str, list[float]], path: Path) -> None:
    """Write the loss curves as a picture (PNG, SVG or PDF, by the file's ending)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, losses), style in zip(curves.items(), ("-", "--"), strict=False):
        axes.plot(losses, style, label=name)
    axes.set(xlabel="step", ylabel="loss, nats per character", title="Character model: training loss")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small character model through anyattn.")
    parser.add_argument("--attention", choices=[*ATTENTIONS, "both"], default="anyattn")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "LICENSE", help="what to train on")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the loss curves (needs matplotlib)")
    arguments = parser.parse_args()

    text = arguments.text.read_text(encoding="utf-8")
    curves: dict[str, list[float]] = {}
    for name in ATTENTIONS if arguments.attention == "both" else [arguments.attention]:
        losses = curves[name] = []
        start = time.perf_counter()
        for step, loss in enumerate(train(text, ATTENTIONS[name], steps=arguments.steps, device=arguments.device), 1):
            losses.append(loss)
            if step == 1 or step % 50 == 0 or step == arguments.steps:
                print(f"{name:8} step {step:5}  loss {loss:.4f}  {time.perf_counter() - start:6.1f} s", flush=True)
    if len(curves) == 2:
        difference = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
        print(f"largest difference between the two curves: {difference:.1e}")
    if arguments.plot:
        draw(curves, arguments.plot)
        print(f"drawn in {arguments.plot}")


if __name__ == "__main__":
    main()
