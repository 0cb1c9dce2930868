"""Vision backbones in timm: importing this package registers them under the prefix "undivided_".

    import timm, undivided.models.vision

    model = timm.create_model("undivided_gcvit_tiny", num_classes=10, img_size=384)

`FAMILIES` lists the modules; each registers its models when it is imported. It needs timm; `import undivided` does not.
"""

from __future__ import annotations

from importlib import import_module

try:
    import timm  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "timm":
        raise
    raise ModuleNotFoundError(
        'undivided.models.vision needs timm: pip install "undivided[vision]".', name="timm"
    ) from error

from undivided.models.vision._backbone import VisionBackbone
from undivided.models.vision._official import load_official
from undivided.models.vision._registration import PREFIX, registered_models

FAMILIES: tuple[str, ...] = ("convit", "gcvit", "litv2", "ravlt", "tic", "vig")

for _family in FAMILIES:
    import_module(f"{__name__}.{_family}")

__all__ = ["FAMILIES", "PREFIX", "VisionBackbone", "load_official", "registered_models"]
