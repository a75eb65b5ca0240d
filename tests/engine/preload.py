"""What every engine imports, imported once: the fork server of `tests.support.forked` runs this.

Nothing here may start a thread: a fork would lose it.
"""

from __future__ import annotations

import gc

import compressed_tensors  # noqa: F401
import vllm.entrypoints.llm
import vllm.model_executor.models.llama
import vllm.v1.executor.uniproc_executor
import vllm.v1.worker.cpu_worker  # noqa: F401

# A child's collector need not look at what is here, and a page that it never touches stays shared.
gc.collect()
gc.freeze()
