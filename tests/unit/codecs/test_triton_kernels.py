"""The Triton encoder writes the bytes that the CPU writes; here, in Triton's interpreter.

The interpreter is chosen when the kernels are imported, so they run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

SCRIPT = """
import numpy as np, torch
from kvstrata.codecs.base import Payload
from kvstrata.codecs.quantized import INTEGERS, Quantized
from kvstrata.codecs.triton_kernels import encode_layer
from kvstrata.testing.codecs import kv_like

device = "cuda" if torch.cuda.is_available() else "cpu"
codecs = [*INTEGERS, Quantized(2, 32, 32, 0, False), Quantized(4, 16, 24, 2, True)]
shapes = [((1, 2, 1, 70, 80), 0), ((1, 1, 1, 5, 40), 0), ((1, 2, 1, 33, 64), 128)]
for codec in codecs:
    for shape, start in shapes:
        payload = Payload(shape, "bfloat16", start)
        raw = kv_like(payload)
        out = np.empty(codec.layer_bound(payload), np.uint8)
        size = codec.encode_layer(raw.view(np.uint16).reshape(shape)[0], 0, payload, out)
        values = torch.from_numpy(raw).view(torch.bfloat16).reshape(shape)[0].to(device)
        same = encode_layer(codec, values, payload).cpu().numpy()
        assert same.tobytes() == out[:size].tobytes(), (codec, payload)
        print("same")
"""


def test_the_bytes_are_those_of_the_cpu() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same"] * 15
