#!/usr/bin/env bash
# torch 2.13.0, CPU, x86-64 Linux: oneDNN's linear runs some thousand times slower if its weight is part of a larger
# matrix.
#
# torch.ops.mkldnn._linear_pointwise is what torch.compile takes for a float32 linear whose weight is frozen, and twice as
# fast as MKL on processors with AVX-512 that are not Intel's. It accepts any strides. A weight [out, in] and its
# transpose both run on code made for the processor (brgemm). Rows of a wider matrix (stride 200 for 128 columns), or the
# transpose of some of its columns, fall to oneDNN's reference code, `ref:any` in ONEDNN_VERBOSE, with no warning. The
# result is right. torch.nn.functional.linear takes such views at full speed, so one would expect the same here, or a copy:
# copying takes a thousandth of the time that is lost.
# Seen: 576 x 128 times 1536 x 128: whole 2 to 8 ms, a view 1200 to 1370 ms, at AVX-512 and at AVX2; a view through
# torch.nn.functional.linear 1.4 to 2.5 ms.
#
# Exits 0 if it is still so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/check.py" <<'PY'
import sys
import time

import torch

product, linear = torch.ops.mkldnn._linear_pointwise, torch.nn.functional.linear
x, wide = torch.randn(576, 128), torch.randn(1536, 200)
seconds = {}
with torch.no_grad():
    for name, weight in {"whole": wide[:, :128].contiguous(), "view": wide[:, :128]}.items():
        for way, of in {"onednn": lambda w: product(x, w, None, "none", [], ""), "linear": lambda w: linear(x, w)}.items():
            of(weight)
            start = time.perf_counter()
            found = of(weight)
            seconds[way, name] = time.perf_counter() - start
            assert torch.allclose(found, linear(x, weight), atol=1e-3), (way, name)
            print(f"{way}, {name}: {1000 * seconds[way, name]:.1f} ms", flush=True)
sys.exit(0 if seconds["onednn", "view"] > 30 * max(seconds["onednn", "whole"], seconds["linear", "view"]) else 1)
PY
ONEDNN_VERBOSE=1 "$folder/venv/bin/python" "$folder/check.py" | tee "$folder/out" | grep -v verbose
grep -q "inner_product,ref:any" "$folder/out"
