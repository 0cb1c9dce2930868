"""A small decode engine for one device: paged latent cache, CUDA graphs, continuous batching.

>>> engine = Engine(model, tokenizer, max_tokens=4096, max_batch=16)
>>> for event in engine.stream(["The cat", "A key"], max_new_tokens=32):
...     print(event.index, event.text)
"""

from undivided.engine._support import has_latent_layers
from undivided.engine.engine import Completion, Engine, Event
from undivided.engine.sampling import Sampling

__all__ = ["Completion", "Engine", "Event", "Sampling", "has_latent_layers"]
