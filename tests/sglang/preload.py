"""What every SGLang imports, imported once: the fork server of `tests.support.forked` runs this.

Nothing here may start a thread: a fork would lose it. And `sglang.launch_server` is left to the
child, which runs it as a program.
"""

from __future__ import annotations

import gc

import sglang.srt.entrypoints.http_server
import sglang.srt.managers.detokenizer_manager
import sglang.srt.managers.scheduler
import sglang.srt.models.registry  # noqa: F401

# A child's collector need not look at what is here, and a page that it never touches stays shared.
gc.collect()
gc.freeze()
