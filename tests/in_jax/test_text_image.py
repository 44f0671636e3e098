"""What a JAX user would write for the text, Flax's own LSTM, computes the same with the biases added up; and ours begins as PyTorch's."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from triptych.core import catalog, initialize

SPEC = catalog.tiny(catalog.get_spec("text_image"))
WEIGHTS = initialize.parity_weights(SPEC, 3)
TEXTS = np.array([[3, 7, 2, 5, 0, 0, 0], [9, 0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7]])  # padding stands behind: `seq_lengths`
BATCH = {"text": TEXTS, "image": np.zeros((len(TEXTS), 12, 12, 3))}


def test_the_lstm_is_that_of_flax(lab: Any) -> None:
    gates = ("i", "f", "g", "o")
    inputs, state = (np.split(WEIGHTS[f"lstm.{name}_l0"].T, 4, axis=1) for name in ("weight_ih", "weight_hh"))
    bias = np.split(WEIGHTS["lstm.bias_ih_l0"] + WEIGHTS["lstm.bias_hh_l0"], 4)
    params = {f"i{gate}": {"kernel": kernel} for gate, kernel in zip(gates, inputs, strict=True)}
    params |= {f"h{gate}": {"kernel": kernel, "bias": b} for gate, kernel, b in zip(gates, state, bias, strict=True)}
    with jax.enable_x64(True):
        recurrent = nn.RNN(nn.OptimizedLSTMCell(SPEC.features, param_dtype=jnp.float64, parent=None), return_carry=True)
        x, lengths = jnp.asarray(WEIGHTS["embedding.weight"][TEXTS]), jnp.asarray((TEXTS != 0).sum(1))
        (_, hidden), _ = recurrent.apply({"params": {"cell": params}}, x, seq_lengths=lengths)  # Flax carries (c, h)
        expected = np.asarray(hidden)
    found = lab.room.create_model(SPEC, WEIGHTS, precision="float64", device="cpu").forward(BATCH).intermediates["lstm"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)


def test_a_module_of_a_user_begins_with_pytorch_s_distributions(lab: Any) -> None:
    module = lab.room.create_model(SPEC, WEIGHTS, precision="float64", device="cpu").native[0]
    params = module.clone(param_dtype=jnp.float32).init(jax.random.key(0), jnp.asarray(TEXTS), jnp.asarray(BATCH["image"], jnp.float32))
    shapes = jax.tree.map(lambda tensor: (tensor.shape, str(tensor.dtype)), params["params"])
    assert shapes["lstm"]["recurrent_kernel"] == ((SPEC.features, 4 * SPEC.features), "float32")
    assert all(np.abs(value).max() <= SPEC.features**-0.5 for value in params["params"]["lstm"].values())
