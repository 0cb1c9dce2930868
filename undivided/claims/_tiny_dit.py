"""Small diffusion transformers on procedural images, trained by flow matching in seconds: for SLA's table.

An image is a textured ground with textured shapes on it. The model sees `x_t = (1 - t) x_0 + t e` and predicts the
velocity `e - x_0`; the loss of the best predictor is not zero, so that arms are compared by what they lose to it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from undivided.claims._tiny_vit import computing
from undivided.claims._wan_shape import DenseCore


def textured_shapes(count: int, size: int, seed: int, device: str) -> torch.Tensor:
    """Returns images `[count, 3, size, size]` of about unit variance: textured discs and squares on a textured ground.

    Args:
        count: images.
        size: pixels of a side.
        seed: of what is drawn.
        device: where.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, 1, 1, generator=generator, device=device)

    axis = torch.linspace(-1, 1, size, device=device)
    y, x = axis[:, None], axis[None, :]

    def texture() -> torch.Tensor:
        angle, frequency, phase = 2 * math.pi * draw(1), 4 + 16 * draw(1), 2 * math.pi * draw(1)
        wave = torch.sin(frequency * (x * angle.cos() + y * angle.sin()) + phase)
        return (2 * draw(3) - 1) + 0.7 * wave * (2 * draw(3) - 1)

    image = texture()
    for _ in range(3):
        dx, dy = (x - (1.4 * draw(1) - 0.7)).abs(), (y - (1.4 * draw(1) - 0.7)).abs()
        distance = torch.where(draw(1) < 0.5, (dx.square() + dy.square()).sqrt(), torch.maximum(dx, dy))
        image = torch.where((distance < 0.15 + 0.3 * draw(1)) & (draw(1) < 0.8), texture(), image)
    return image / 0.7


class Attention(nn.Module):
    """Self-attention of image tokens, normalised by heads; `core` is what SLA exchanges.

    Args:
        width: channels.
        heads: heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv_proj, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_query, self.norm_key = nn.RMSNorm(self.head_dim), nn.RMSNorm(self.head_dim)
        self.core: nn.Module = DenseCore()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.norm_query(query).type_as(value), self.norm_key(key).type_as(value)
        return self.out(self.core(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer of a DiT: attention and MLP, both modulated by the time.

    Args:
        width: channels.
        heads: heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class TinyDiT(nn.Module):
    """A diffusion transformer of images, which predicts the velocity.

    Args:
        size: pixels of a side.
        patch_size: pixels of a patch's side.
        width: channels.
        depth: layers.
        heads: heads.
        seed: of the weights.
    """

    def __init__(self, size: int, patch_size: int, width: int, depth: int, heads: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.patch_size = patch_size
        self.embed = nn.Conv2d(3, width, patch_size, patch_size)
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch_size) ** 2, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3 * patch_size**2)
        nn.init.zeros_(self.head.weight)

    def forward(self, image: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(image)
        rows = tokens.shape[-1]
        x = tokens.flatten(2).transpose(1, 2) + self.positions
        half = self.positions.shape[1] // 2
        angle = 1000 * time[:, None] * 1e4 ** (-torch.arange(half, device=time.device) / half)
        condition = self.time(torch.cat([angle.cos(), angle.sin()], 1))
        for block in self.blocks:
            x = block(x, condition)
        patches = self.head(self.norm(x)).transpose(1, 2).unflatten(2, (rows, rows))
        return F.pixel_shuffle(patches, self.patch_size)


def mixed(images: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the images between image and noise at these times, and their velocity."""
    share = time[:, None, None, None]
    return (1 - share) * images + share * noise, noise - images


def train(
    model: nn.Module, images: torch.Tensor, *, steps: int, batch_size: int, learning_rate: float, seed: int,
    new_factor: float = 1.0, at: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Trains in place by flow matching; on CUDA a step is one CUDA graph, in bf16.

    Args:
        model: predicts the velocity from image and time.
        images: what is learned.
        steps, batch_size: of the optimiser.
        learning_rate: the highest; warmed up over a tenth of the steps, then falling to a tenth as a cosine.
        seed: of the order, the times and the noise.
        new_factor: how many times faster the projections of SLA learn, which are new and start at zero.
        at: called with the number of steps done.
    """
    device = images.device
    on_cuda = device.type == "cuda"
    generator = torch.Generator(device).manual_seed(seed)
    x, target = torch.zeros_like(images[:batch_size]), torch.zeros_like(images[:batch_size])
    time = torch.zeros(batch_size, device=device)
    parts: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        parts["core.proj." in name].append(parameter)
    groups = [
        {
            "params": own,
            "factor": new_factor if is_new else 1.0,
            "lr": torch.zeros((), device=device) if on_cuda else 0.0,
        }
        for is_new, own in parts.items()
    ]
    optimiser = torch.optim.AdamW(
        groups, betas=(0.9, 0.99), weight_decay=0.0, fused=on_cuda, capturable=on_cuda
    )
    state = copy.deepcopy(model.state_dict())

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with computing(device):
            loss = F.mse_loss(model(x, time).float(), target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

    run = step
    if on_cuda:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
        # What warming up did is undone.
        model.load_state_dict(state)
        for own in optimiser.state.values():
            for value in own.values():
                value.zero_()
    for number in range(steps):
        chosen = torch.randint(len(images), (batch_size,), generator=generator, device=device)
        time.copy_(torch.rand(batch_size, generator=generator, device=device))
        noise = torch.randn(x.shape, generator=generator, device=device)
        for own, value in zip((x, target), mixed(images[chosen], noise, time), strict=True):
            own.copy_(value)
        warm = min((number + 1) / max(steps // 10, 1), 1.0)
        now = learning_rate * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * number / steps)))
        for group in optimiser.param_groups:
            own_rate = now * group["factor"]
            group["lr"] = group["lr"].fill_(own_rate) if on_cuda else own_rate
        run()
        if at is not None:
            at(number + 1)


@torch.no_grad()
def predictions(
    model: nn.Module, images: torch.Tensor, batch_size: int = 16
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the model's velocities and the true ones at fixed times and noise."""
    generator = torch.Generator(images.device).manual_seed(1234)
    for batch in images.split(batch_size):
        noise = torch.randn(batch.shape, generator=generator, device=batch.device)
        time = (torch.arange(len(batch), device=batch.device) + 0.5) / len(batch)
        x, velocity = mixed(batch, noise, time)
        with computing(images.device):
            found = model(x, time)
        yield found.float(), velocity


def loss_of(model: nn.Module, images: torch.Tensor) -> float:
    """Returns the flow-matching loss on these images."""
    return (
        torch.stack([F.mse_loss(found, velocity) for found, velocity in predictions(model, images)])
        .mean()
        .item()
    )


def distance_of(model: nn.Module, teacher: nn.Module, images: torch.Tensor) -> float:
    """Returns `sum |v - v'| / sum |v'|` of the velocities of a model and of the one it came from."""
    pairs = zip(predictions(model, images), predictions(teacher, images), strict=True)
    parts = [
        torch.stack([(ours - theirs).abs().sum(), theirs.abs().sum()]) for (ours, _), (theirs, _) in pairs
    ]
    difference, size = torch.stack(parts).sum(0).tolist()
    return difference / size


@torch.no_grad()
def attention_maps(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Returns the softmax weights of each layer, float32 `[batch, heads, tokens, tokens]`, at the middle time."""
    found: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        query, key, _ = inputs
        logits = query.float() @ key.float().transpose(-2, -1) * query.shape[-1] ** -0.5
        found.append(logits.softmax(-1))

    handles = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, DenseCore)]
    noise = torch.randn(
        images.shape, generator=torch.Generator(images.device).manual_seed(5), device=images.device
    )
    time = torch.full((len(images),), 0.5, device=images.device)
    model(mixed(images, noise, time)[0], time)
    for handle in handles:
        handle.remove()
    return found


def stable_rank(matrices: torch.Tensor, iterations: int = 100) -> float:
    """Returns the mean of `|A|_F^2 / |A|_2^2` over matrices without negative entries, by powers of `A^T A`."""
    matrices = matrices.float()
    vector = torch.ones_like(matrices[..., :1, :]).transpose(-2, -1)
    for _ in range(iterations):
        vector = matrices.transpose(-2, -1) @ (matrices @ vector)
        vector = vector / vector.norm(dim=-2, keepdim=True)
    top = (matrices @ vector).square().sum((-2, -1))
    return (matrices.square().sum((-2, -1)) / top).mean().item()
