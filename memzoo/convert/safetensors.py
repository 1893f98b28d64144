"""Files of arrays in the safetensors format, in numpy alone.

A file is the length of its header (8 bytes, little-endian), the header, JSON
{name: {'dtype', 'shape', 'data_offsets': [begin, end]}}, and the arrays' bytes
in C order, offsets counted from the header's end. Large models lie in many
files, with an index {'weight_map': {name: file}} beside them.

Source: github.com/huggingface/safetensors, README, section "Format".
"""

from collections.abc import Mapping
import json

from etils import epath
import jax.numpy as jnp
import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
  "F64": np.dtype("<f8"),
  "F32": np.dtype("<f4"),
  "F16": np.dtype("<f2"),
  "BF16": jnp.dtype(jnp.bfloat16),
  "I64": np.dtype("<i8"),
  "I32": np.dtype("<i4"),
  "I16": np.dtype("<i2"),
  "I8": np.dtype("i1"),
  "U8": np.dtype("u1"),
  "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read(path) -> dict[str, np.ndarray]:
  """The arrays of a file, by name.

  Raises:
    ValueError: on a file that is none, is cut short, or has a dtype that numpy
      has not.
  """
  data = memoryview(epath.Path(path).read_bytes())
  start = 8 + int.from_bytes(data[:8], "little")
  if len(data) < 8 or start > len(data):
    raise ValueError(f"{path}: no safetensors file, or one that is cut short")
  try:
    header = json.loads(bytes(data[8:start]))
  except ValueError as error:
    raise ValueError(f"{path}: no safetensors file: {error}") from None
  header.pop("__metadata__", None)
  arrays = {}
  for name, entry in header.items():
    if entry["dtype"] not in DTYPES:
      raise ValueError(
        f"{path}: {name} has dtype {entry['dtype']}; known: {', '.join(DTYPES)}"
      )
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = (start + n for n in entry["data_offsets"])
    size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if end - begin != size or end > len(data):
      raise ValueError(
        f"{path}: {name} must have {size} bytes, the file holds "
        f"{max(min(end, len(data)) - begin, 0)}"
      )
    arrays[name] = np.frombuffer(data[begin:end], dtype).reshape(shape)
  return arrays


def write(path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes arrays by name.

  Raises:
    ValueError: on a dtype that the format has not.
  """
  header, offset = {"__metadata__": {"format": "pt"}}, 0
  for name, x in arrays.items():
    if x.dtype not in _NAMES:
      raise ValueError(
        f"{path}: {name} has dtype {x.dtype}; known: {', '.join(DTYPES)}"
      )
    header[name] = {
      "dtype": _NAMES[x.dtype],
      "shape": list(x.shape),
      "data_offsets": [offset, offset + x.nbytes],
    }
    offset += x.nbytes
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # the arrays begin at a multiple of 8
  with epath.Path(path).open("wb") as file:
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for x in arrays.values():
      file.write(np.ascontiguousarray(x).tobytes())


def read_folder(folder) -> dict[str, np.ndarray]:
  """The arrays of a model's folder, in one file or in those of its index.

  Raises:
    ValueError: where there is neither, and as `read` does.
  """
  folder = epath.Path(folder)
  if (folder / SINGLE).exists():
    return read(folder / SINGLE)
  if not (folder / INDEX).exists():
    raise ValueError(f"{folder}: has neither {SINGLE} nor {INDEX}")
  places = json.loads((folder / INDEX).read_text())["weight_map"]
  arrays = {}
  for file in sorted(set(places.values())):
    arrays |= read(folder / file)
  return arrays
