"""Folders of published language models: read, written, and read again.

Parity runs where transformers is:
  python -m pytest -n 0 tests/convert_checkpoint_test.py
"""

import json

import checks
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memzoo
from memzoo.convert import checkpoint, safetensors
from memzoo.models import LanguageModel

CELLS = {
  "falcon_mamba": memzoo.tiny("mamba", select_norm=1e-3),
  "mamba": memzoo.tiny("mamba"),
  "mamba2": memzoo.tiny("mamba2"),
}
MIXER_ONLY = dict(mlp_width=0)


def draw(cell, tied=True, **options):
  """A language model of two blocks, no two of its parameters alike."""
  model = LanguageModel(
    cell, 2, 11, tie_embeddings=tied, rngs=nnx.Rngs(0), **options
  )
  r = np.random.default_rng(0)
  noise = lambda x: x + jnp.asarray(0.2 * r.normal(size=x.shape), x.dtype)
  nnx.update(model, jax.tree.map(noise, nnx.state(model)))
  return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_round_trip(name, tied, tmp_path):
  model = draw(CELLS[name], tied, **MIXER_ONLY)
  checkpoint.save(model, tmp_path, extra=dict(eos_token_id=3))
  again = checkpoint.load(tmp_path)
  config = json.loads((tmp_path / "config.json").read_text())
  assert config["model_type"] == name and config["eos_token_id"] == 3
  assert again.config() == model.config()
  old, new = (jax.tree.leaves(nnx.state(m)) for m in (model, again))
  for x, y in zip(old, new, strict=True):
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(x, y)
  assert checkpoint.load(tmp_path, dtype="bfloat16").encoder.dtype == "bfloat16"


def test_files(tmp_path):
  """The format's own bytes; many files; half precision."""
  header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
  data = np.float32([1.5, -2]).tobytes()
  path = tmp_path / "one.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + data)
  np.testing.assert_array_equal(safetensors.read(path)["a"], [1.5, -2])
  arrays = {
    "b": np.arange(6.0).reshape(2, 3).T,  # not contiguous
    "c": np.asarray(jnp.ones((2, 0), jnp.bfloat16)),
    "d": np.asarray(jnp.arange(4, dtype=jnp.bfloat16)),
    "e": np.float16(7.5),
  }
  safetensors.write(tmp_path / "two.safetensors", arrays)
  index = {"a": "one.safetensors"} | dict.fromkeys(arrays, "two.safetensors")
  with pytest.raises(ValueError, match="has neither model.safetensors nor"):
    safetensors.read_folder(tmp_path)
  (tmp_path / safetensors.INDEX).write_text(json.dumps({"weight_map": index}))
  found = safetensors.read_folder(tmp_path)
  assert found.keys() == index.keys()
  for name, x in arrays.items():
    assert found[name].dtype == x.dtype
    np.testing.assert_array_equal(found[name], x)
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(ValueError, match="a must have 8 bytes, .* holds 7"):
    safetensors.read(path)
  path.write_bytes(b"\x00" * 3)
  with pytest.raises(ValueError, match="no safetensors file"):
    safetensors.read(path)
  path.write_bytes((2).to_bytes(8, "little") + b"[}")
  with pytest.raises(ValueError, match="no safetensors file"):
    safetensors.read(path)
  with pytest.raises(ValueError, match="b has dtype complex64"):
    safetensors.write(path, {"b": np.zeros(2, np.complex64)})


def test_infinity(tmp_path):
  """JSON has none, and transformers writes it in its own way."""
  checkpoint.save(draw(CELLS["mamba2"], **MIXER_ONLY), tmp_path)
  path = tmp_path / "config.json"
  config = json.loads(path.read_text())
  write = lambda x: path.write_text(json.dumps(config | x))
  write(dict(time_step_limit=[0.0, {"__float__": "Infinity"}]))
  checkpoint.load(tmp_path)
  write(dict(time_step_limit=[0.0, 0.1]))
  with pytest.raises(ValueError, match="does not clip steps"):
    checkpoint.load(tmp_path)


def test_what_does_not_fit(tmp_path):
  cell = CELLS["mamba"]
  with pytest.raises(ValueError, match="must be a LanguageModel, got int"):
    checkpoint.save(3, tmp_path)
  with pytest.raises(ValueError, match="the model has mlp_width=None"):
    checkpoint.save(draw(cell), tmp_path)
  with pytest.raises(ValueError, match="the model has positions=9"):
    checkpoint.save(draw(cell, positions=9, **MIXER_ONLY), tmp_path)
  with pytest.raises(ValueError, match="of one cell, .* got gru"):
    checkpoint.save(draw(memzoo.tiny("gru"), **MIXER_ONLY), tmp_path)
  checkpoint.save(draw(cell, **MIXER_ONLY), tmp_path)
  path, file = tmp_path / "config.json", tmp_path / safetensors.SINGLE
  config, arrays = json.loads(path.read_text()), safetensors.read(file)
  write = lambda **more: path.write_text(json.dumps(config | more))
  write(model_type="mamba3")
  with pytest.raises(ValueError, match="unknown model_type 'mamba3'.*'mamba"):
    checkpoint.load(tmp_path)
  write(layer_norm_epsilon=1e-6)
  with pytest.raises(ValueError, match="layer_norm_epsilon=1e-06 has no equal"):
    checkpoint.load(tmp_path)
  write(tie_word_embeddings=False)
  with pytest.raises(ValueError, match="lm_head.weight is missing"):
    checkpoint.load(tmp_path)
  write(num_hidden_layers=1)
  with pytest.raises(ValueError, match="layers.1.mixer.A_log is unknown"):
    checkpoint.load(tmp_path)
  write()
  safetensors.write(file, arrays | {"lm_head.weight": np.zeros(1, np.float32)})
  checkpoint.load(tmp_path)  # a tied head is written by some
  arrays["backbone.layers.1.mixer.A_log"] = np.zeros(2, np.float32)
  safetensors.write(file, arrays)
  with pytest.raises(ValueError, match=r"layers.1.mixer.*A_log must be \[9, 5"):
    checkpoint.load(tmp_path)


CONFIGS = {
  "falcon_mamba": ("FalconMamba", dict(time_step_rank=2, mixer_rms_eps=1e-3)),
  "mamba": ("Mamba", dict(time_step_rank=2)),
  "mamba2": ("Mamba2", dict(num_heads=6, head_dim=4, n_groups=2, chunk_size=8)),
}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_parity(name, tied, tmp_path):
  """A random model of theirs, saved by them and read by us; written by us with
  other weights, and read by them: logits of whole sequences."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  cls, more = CONFIGS[name]
  config = getattr(transformers, f"{cls}Config")(
    vocab_size=11, hidden_size=8, expand=3, state_size=5, conv_kernel=3,
    num_hidden_layers=2, tie_word_embeddings=tied, **more,
  )  # fmt: skip
  theirs = getattr(transformers, f"{cls}ForCausalLM")(config).eval()
  r = np.random.default_rng(9)
  with torch.no_grad():
    for p in theirs.parameters():
      p.copy_(torch.tensor(0.4 * r.normal(size=p.shape) + (p.ndim == 1) * 0.5))
  theirs.save_pretrained(tmp_path / "theirs")
  ours = checkpoint.load(tmp_path / "theirs")
  tokens = r.integers(0, 11, size=(2, 35))

  def error(ours, theirs):
    with torch.no_grad():
      want = theirs(torch.tensor(tokens), use_cache=False).logits.numpy()
    run = jax.jit(lambda tokens: ours(None, tokens)[1])
    return checks.relative(run(jnp.asarray(tokens)), want)

  first = error(ours, theirs)
  nnx.update(ours, jax.tree.map(lambda x: 0.9 * x, nnx.state(ours)))
  checkpoint.save(ours, tmp_path / "ours")
  auto = transformers.AutoModelForCausalLM
  back = auto.from_pretrained(tmp_path / "ours").eval()
  assert type(back) is type(theirs)
  second = error(ours, back)
  print(f"{name} tied={tied}: read {first:.1e}, written {second:.1e}")
  assert first < 1e-5 and second < 1e-5
  old, new = theirs.state_dict(), back.state_dict()
  assert old.keys() == new.keys()
  for n, x in old.items():
    np.testing.assert_array_equal(new[n], np.float32(0.9) * x.numpy())
