"""Generation: continuous batching over a static cache, under a grammar where there is one, on a GPU as CUDA graphs.

`requests` is what goes in and comes out; `scheduler` gives slots, `runner` runs the decoder for them, `rows` and
`kernels` choose tokens, `grammar` says which may come, and `engine` is the loop around them.
"""

from decoder.engine.engine import Engine, generate
from decoder.engine.grammar import Grammar
from decoder.engine.requests import Completion, Request, Shared

__all__ = ["Completion", "Engine", "Grammar", "Request", "Shared", "generate"]
