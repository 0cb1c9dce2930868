"""Small real text, demo weights and procedural data with known truth."""

from undivided.data.demo import demo_model
from undivided.data.images import ImageSet, digits, fashion_mnist, read_images
from undivided.data.text import DemoTexts, demo_texts, read_text, token_blocks

__all__ = [
    "DemoTexts",
    "ImageSet",
    "demo_model",
    "demo_texts",
    "digits",
    "fashion_mnist",
    "read_images",
    "read_text",
    "token_blocks",
]
