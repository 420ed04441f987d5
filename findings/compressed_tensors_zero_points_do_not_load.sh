#!/usr/bin/env bash
# compressed-tensors 0.20.1 (with torch 2.13.0, transformers 5.24.0): transformers cannot load weights that are packed with
# zero points, which compressed-tensors itself has packed.
#
# transformers makes an empty model, lets compressed-tensors give it the packed layout, and loads the file's tensors into
# it. PackedQuantizationCompressor.compress returns early for tensors on the meta device, before it packs the zero points:
# the empty model expects one value for each row, the file has eight of 4 bits in a word. from_pretrained reports MISMATCH
# and raises RuntimeError. Symmetric weights, which have none, load well.
# Seen: 8 rows of 4-bit codes: weight_zero_point is [1, 2] if packed, and [8, 2] on the meta device.
#
# Exits 0 if it is still so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 compressed-tensors==0.20.1
cat > "$folder/check.py" <<'PY'
import sys

import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

weights = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=32)
scheme = QuantizationScheme(targets=["Linear"], weights=weights)
state = {
    "weight": torch.randn(8, 64),
    "weight_scale": torch.ones(8, 2),
    "weight_zero_point": torch.zeros(8, 2, dtype=torch.int8),
}
shapes = {}
for device in ("cpu", "meta"):
    packed = PackedQuantizationCompressor.compress({k: v.to(device) for k, v in state.items()}, scheme)
    shapes[device] = {name: list(packed[name].shape) for name in ("weight_packed", "weight_zero_point")}
    print(device, shapes[device])
same = shapes["cpu"]["weight_packed"] == shapes["meta"]["weight_packed"]
sys.exit(0 if same and shapes["cpu"]["weight_zero_point"] != shapes["meta"]["weight_zero_point"] else 1)
PY
"$folder/venv/bin/python" "$folder/check.py"
