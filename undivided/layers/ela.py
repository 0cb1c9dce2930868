"""Efficient local attention: gates for the rows and the columns of a CNN's map, and how to put them into a network.

This is ELA of arXiv 2403.01123; other modules have the same name. The authors' code (github.com/Xuwei86/ELA_Code)
shares one convolution and one norm between both axes, in all four versions; so does `ELA` here by default. One name
there, ELA72, is version T, S or L, by folder; the weights released for YOLOX-Nano have the shape of T, not of the L
that stands beside them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn

from undivided.layers._vision import Size, as_pair
from undivided.ops import strip_attention
from undivided.ops.strips.composed import gate, strip_means


class Version(NamedTuple):
    """Sizes of one version: taps, channels that a convolution mixes, groups of the norm."""

    kernel_size: int
    group_width: int
    norm_groups: int


VERSIONS: dict[str, Version] = {
    "T": Version(5, 1, 32),
    "B": Version(7, 1, 16),
    "S": Version(5, 8, 16),
    "L": Version(7, 8, 16),
}
# sigmoid(4)^2 is 0.96: a network that is trained already hardly notices.
_OPEN = 4.0


class ELA(nn.Module):
    """Gates of rows and columns: `out = x * y_h * y_w`, with `y = sigmoid(GroupNorm(conv(z)))` of strip means z.

    `z_h [B, C, H]` is the mean of each row, `z_w [B, C, W]` of each column; the 1-D convolution runs along the strip
    and has no bias. Means, convolution and norm are computed in float32 at least; the products in the type of x. In
    a fresh layer both gates are about 0.5, so that the output is about a quarter of x: it belongs inside a residual
    branch. The norm's statistics are those of one image, in training as in inference.

    Composed of PyTorch's operators it reads x four times and writes it twice; the kernels that CUDA tensors get read it
    twice and write it once, which is the least for strips that do not stay on the chip.

    Args:
        channels: C.
        version: "T", "B", "S" or "L": the defaults of the next three.
        kernel_size: taps of the convolution, odd.
        conv_groups: groups of the convolution; C in T and B, C // 8 in S and L.
        norm_groups: groups of the norm.
        share: one convolution and one norm for both axes, as the authors have it; else two of each.
        residual: `out = x + x * y_h * y_w`, as in the authors' segmentation network.
        padding_mode: "zeros", or "circular" for strips of `kernel_size // 2` positions or more.
        near_identity: start with gates of 0.98 (weight 0 and bias 4 of the norm), for networks that are trained
            already; not in the paper.
        strict: refuse groups that do not divide C. Else the largest divisor below is taken; `adapted` says where.
        backend: of `undivided.ops.strip_attention`.
        device, dtype: of the weights.

    Attributes:
        adapted: name of each group count that was lowered -> (asked for, taken).

    Shape:
        `forward(x [B, C, H, W])` gives `[B, C, H, W]`, any H and W.

    Raises:
        ValueError: an unknown version or padding, an even kernel, groups that do not divide C with `strict`.

    Source: ELA (arXiv 2403.01123), section 3, and the authors' code.
    """

    def __init__(
        self,
        channels: int,
        version: str = "B",
        *,
        kernel_size: int | None = None,
        conv_groups: int | None = None,
        norm_groups: int | None = None,
        share: bool = True,
        residual: bool = False,
        padding_mode: str = "zeros",
        near_identity: bool = False,
        strict: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels={channels} must be positive.")
        if version not in VERSIONS:
            raise ValueError(f"version={version!r} is not one of {', '.join(map(repr, VERSIONS))}.")
        if padding_mode not in ("zeros", "circular"):
            raise ValueError(f'padding_mode={padding_mode!r} must be "zeros" or "circular".')
        sizes = VERSIONS[version]
        self.channels = channels
        self.version = version
        self.kernel_size = sizes.kernel_size if kernel_size is None else kernel_size
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd, so that strips keep their length.")
        self.adapted: dict[str, tuple[int, int]] = {}
        self.conv_groups = self._groups(
            "conv_groups",
            max(channels // sizes.group_width, 1) if conv_groups is None else conv_groups,
            strict,
        )
        self.norm_groups = self._groups(
            "norm_groups", sizes.norm_groups if norm_groups is None else norm_groups, strict
        )
        self.share = share
        self.residual = residual
        self.padding_mode = padding_mode
        self.near_identity = near_identity
        self.backend = backend
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv, self.norm = self._branch(options)
        if not share:
            self.conv_w, self.norm_w = self._branch(options)
        self.initialise()

    def _groups(self, name: str, wanted: int, strict: bool) -> int:
        if wanted < 1:
            raise ValueError(f"{name}={wanted} must be positive.")
        taken = largest_divisor(self.channels, wanted)
        if taken != wanted:
            if strict:
                raise ValueError(
                    f"{name}={wanted} does not divide channels={self.channels}; {taken} would, and is taken with "
                    "strict=False."
                )
            self.adapted[name] = (wanted, taken)
        return taken

    def _branch(self, options: dict[str, Any]) -> tuple[nn.Conv1d, nn.GroupNorm]:
        conv = nn.Conv1d(
            self.channels, self.channels, self.kernel_size, groups=self.conv_groups, bias=False,
            padding=self.kernel_size // 2, padding_mode=self.padding_mode, **options,
        )  # fmt: skip
        return conv, nn.GroupNorm(self.norm_groups, self.channels, **options)

    def initialise(self) -> None:
        """Opens the gates with `near_identity`; otherwise leaves torch's defaults."""
        if self.near_identity:
            for module in self.modules():
                if isinstance(module, nn.GroupNorm):
                    nn.init.zeros_(module.weight)
                    nn.init.constant_(module.bias, _OPEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._check(x)
        return strip_attention(
            x, *self._weights(), conv_groups=self.conv_groups, norm_groups=self.norm_groups, eps=self.norm.eps,
            is_circular=self.padding_mode == "circular", residual=self.residual, backend=self.backend,
        )  # fmt: skip

    def _weights(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        branches = [(self.conv, self.norm)] + ([] if self.share else [(self.conv_w, self.norm_w)])
        return [(conv.weight, norm.weight, norm.bias) for conv, norm in branches]

    def _check(self, x: torch.Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"x has shape {list(x.shape)}; it must be a map [batch, channels={self.channels}, height, width]."
            )

    def gates(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the gates of the rows `[B, C, H]` and of the columns `[B, C, W]`, in float32 at least.

        Raises:
            ValueError: x is no map `[B, C, H, W]` of this layer's channels.
        """
        self._check(x)
        options = self.conv_groups, self.norm_groups, self.norm.eps, self.padding_mode == "circular"
        # Autocast would round the strips; on the meta device there is none.
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            rows, columns = strip_means(x)
            weights = self._weights()
            return gate(rows, *weights[0], *options), gate(columns, *weights[-1], *options)

    def load_official(self, state_dict: Mapping[str, torch.Tensor], prefix: str = "") -> None:
        """Loads one module of the authors' code: `conv.weight`, `gn.weight`, `gn.bias`.

        Groups of the norm leave no trace in the weights: the caller must know the version.

        Args:
            state_dict: name -> tensor, of the module or of a whole checkpoint.
            prefix: name of the module in the checkpoint, such as "backbone.feat06".

        Raises:
            ValueError: a tensor is missing or has another shape; nothing is loaded then.
        """
        branches = [(self.conv, self.norm)] + ([] if self.share else [(self.conv_w, self.norm_w)])
        found = {}
        for short, own in zip(_OFFICIAL, (self.conv.weight, self.norm.weight, self.norm.bias), strict=True):
            name = f"{prefix}.{short}" if prefix else short
            if name not in state_dict:
                raise ValueError(
                    f"state_dict has no {name}; a module of the authors has {', '.join(_OFFICIAL)}."
                )
            if state_dict[name].shape != own.shape:
                raise ValueError(
                    f"{name} has shape {list(state_dict[name].shape)} in state_dict, but {list(own.shape)} in this "
                    f"layer{_fitting(state_dict[name].shape) if short == _OFFICIAL[0] else ''}."
                )
            found[short] = state_dict[name]
        with torch.no_grad():
            for conv, norm in branches:
                for parameter, short in zip((conv.weight, norm.weight, norm.bias), _OFFICIAL, strict=True):
                    parameter.copy_(found[short])

    def extra_repr(self) -> str:
        adapted = "".join(
            f", {name} lowered from {asked} to {taken}" for name, (asked, taken) in self.adapted.items()
        )
        return f"{self.channels}, version={self.version!r}, share={self.share}, residual={self.residual}{adapted}"


_OFFICIAL = ("conv.weight", "gn.weight", "gn.bias")


def _fitting(shape: torch.Size) -> str:
    """Names the versions whose convolution has this shape."""
    names = [
        name for name, sizes in VERSIONS.items() if tuple(shape[1:]) == (sizes.group_width, sizes.kernel_size)
    ]
    return f"; {shape[0]} channels of version {' or '.join(names)} have it" if names else ""


def largest_divisor(number: int, limit: int) -> int:
    """Returns the largest divisor of `number` that is not above `limit`."""
    return next(divisor for divisor in range(min(limit, number), 0, -1) if number % divisor == 0)


def add_ela(
    model: nn.Module,
    where: str | Sequence[str] = "block",
    version: str = "B",
    *,
    image_size: int | Size | None = None,
    kernel_size: int | None = None,
    conv_groups: int | None = None,
    norm_groups: int | None = None,
    share: bool = True,
    residual: bool = False,
    near_identity: bool = False,
    strict: bool = False,
) -> dict[str, ELA]:
    """Puts an `ELA` into a CNN, in place, at each of its blocks, at each stage, or behind modules of given names.

    How many channels a place has, one forward pass of an empty image in inference mode tells. Load pretrained weights
    before: a wrapped module's are called `<name>.body.<...>` afterwards. In place of `where="block"` a network can be
    created with it: `timm.create_model("resnet50", block_args=dict(attn_layer=ELA))`.

    Args:
        model: a CNN, of timm or not.
        where: "block": the place that timm's blocks have for such a layer and leave empty, `block.se`: in ResNets
            before the residual sum, in inverted residuals behind the depthwise convolution. "stage": behind each
            stage that `model.feature_info` lists, not behind the stem. Otherwise names of modules, with `*`, `?` and
            `[...]` as in names of files (`*` goes across dots): the layer takes the place of an `nn.Identity`, is
            appended to an `nn.Sequential`, and makes a pair `nn.Sequential(body, ela)` with any other. The authors'
            MobileNetV2 is "blocks.[1-6].*.se" with version "L", their ResNet-50 for segmentation
            ("maxpool", "layer?", "layer*.act2") with version "S" and `residual`.
        version: and what follows: as in `ELA`.
        image_size: of the empty image; by default that of `model.pretrained_cfg`, or 224.
        kernel_size, conv_groups, norm_groups, share, residual, near_identity, strict: as in `ELA`.

    Returns:
        Name in the model -> the new layer, in the order of `model.named_modules()`.

    Raises:
        ValueError: nothing has such a name or place, or a place has no map `[B, C, H, W]`; the model is as before.

    Source: the authors' code of ELA (arXiv 2403.01123).
    """
    names = _places(model, where)
    here = next(model.parameters())
    layers = {}
    for name, channels in _channels(model, names, image_size).items():
        layers[name] = ELA(
            channels, version, kernel_size=kernel_size, conv_groups=conv_groups, norm_groups=norm_groups,
            share=share, residual=residual, near_identity=near_identity, strict=strict,
            device=here.device, dtype=here.dtype,
        ).train(model.training)  # fmt: skip
    return {_insert(model, name, layer): layer for name, layer in layers.items()}


def _places(model: nn.Module, where: str | Sequence[str]) -> list[str]:
    if where == "block":
        found = [
            f"{name}.se" if name else "se"
            for name, module in model.named_modules()
            if hasattr(module, "se") and isinstance(module.se, nn.Identity | None)
        ]
        missing = 'no block has an empty place for it (an attribute "se")'
    elif where == "stage":
        stages = [info["module"] for info in getattr(model, "feature_info", ()) if "module" in info]
        found = [name for name in stages if not _is_stem(model, name)]
        missing = "its feature_info lists no stages"
    else:
        patterns = (where,) if isinstance(where, str) else tuple(where)
        names = [name for name, _ in model.named_modules() if name]
        found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
        missing = f"its modules are called {', '.join(names[-3:])} and the like"
    if not found:
        raise ValueError(f"where={where!r} is nowhere in {type(model).__name__}: {missing}.")
    return found


def _is_stem(model: nn.Module, name: str) -> bool:
    # In ResNets the stem's entry is its activation, which has no children.
    return name.startswith("stem") or next(model.get_submodule(name).children(), None) is None


def _channels(model: nn.Module, names: list[str], image_size: int | Size | None) -> dict[str, int]:
    """Returns the channels of the maps at these places; leaves an identity where there was nothing."""
    if image_size is None:
        config = getattr(model, "pretrained_cfg", None) or {}
        image_size = tuple(config.get("input_size", (3, 224, 224))[1:])
    here = next(model.parameters())
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    image = torch.zeros(
        1, 3 if first is None else first.in_channels, *as_pair("image_size", image_size),
        device=here.device, dtype=here.dtype,
    )  # fmt: skip
    seen: dict[str, Any] = {}
    with _inference(model), _filled(model, names):
        hooks = [
            model.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: seen.setdefault(name, output)
            )
            for name in names
        ]
        try:
            model(image)
        finally:
            for hook in hooks:
                hook.remove()
    for name in names:
        if not (isinstance(seen.get(name), torch.Tensor) and seen[name].dim() == 4):
            kind = "is not reached" if name not in seen else f"gives {_described(seen[name])}"
            raise ValueError(f"{name} {kind} in a forward pass; it must give a map [B, C, H, W].")
    return {name: seen[name].shape[1] for name in names}


def _described(output: Any) -> str:
    return f"shape {list(output.shape)}" if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _filled(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Fills places that hold None with identities for a while, because a hook needs a module."""
    empty = []
    for name in names:
        parent, _, attribute = name.rpartition(".")
        owner = model.get_submodule(parent)
        if getattr(owner, attribute) is None:
            empty.append((owner, attribute))
            setattr(owner, attribute, nn.Identity())
    try:
        yield
    finally:
        for owner, attribute in empty:
            setattr(owner, attribute, None)


def _insert(model: nn.Module, name: str, layer: ELA) -> str:
    """Puts the layer at its place and returns its name."""
    parent, _, attribute = name.rpartition(".")
    owner = model.get_submodule(parent)
    old = getattr(owner, attribute)
    if old is None or isinstance(old, nn.Identity):
        setattr(owner, attribute, layer)
        return name
    if type(old) is nn.Sequential:
        old.append(layer)
        return f"{name}.{len(old) - 1}"
    setattr(owner, attribute, nn.Sequential(OrderedDict(body=old, ela=layer)))
    return f"{name}.ela"
