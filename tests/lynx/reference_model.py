"""The released model, written out in plain PyTorch under the names of its checkpoints: what ours must compute.

Everything is computed in the parameters' dtype, one sample and one head at a time.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, *, causal: bool = False) -> Tensor:
    """(queries, heads * d), (keys, heads * d) twice -> (queries, heads * d)."""
    outputs = []
    for q_head, k_head, v_head in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = q_head @ k_head.T / q_head.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        outputs.append(scores.softmax(-1) @ v_head)
    return torch.cat(outputs, -1)


def module(**parts: nn.Module) -> nn.Module:
    """A module with these submodules."""
    whole = nn.Module()
    for name, part in parts.items():
        whole.add_module(name, part)
    return whole


class VisionEncoder(nn.Module):
    def __init__(self, width, hidden, depth, heads, patch, grid):
        super().__init__()
        self.heads = heads
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid * grid, width))
        self.patch_embed = module(proj=nn.Conv2d(3, width, patch, patch))
        self.blocks = nn.ModuleList(
            module(
                norm1=nn.LayerNorm(width, eps=1e-6),
                attn=module(
                    q_proj=nn.Linear(width, width),
                    k_proj=nn.Linear(width, width, bias=False),
                    v_proj=nn.Linear(width, width),
                    proj=nn.Linear(width, width),
                ),
                norm2=nn.LayerNorm(width, eps=1e-6),
                mlp=module(fc1=nn.Linear(width, hidden), fc2=nn.Linear(hidden, width)),
            )
            for _ in range(depth)
        )

    def forward(self, frame: Tensor) -> Tensor:
        """(3, S, S) -> (1 + grid * grid, width)."""
        patches = self.patch_embed.proj(frame[None])[0].flatten(1).T
        x = torch.cat([self.cls_token[0], patches]) + self.pos_embed[0]
        for block in self.blocks:
            y = block.norm1(x)
            y = attend(block.attn.q_proj(y), block.attn.k_proj(y), block.attn.v_proj(y), self.heads)
            x = x + block.attn.proj(y)
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
        return x


class Bridge(nn.Module):
    def __init__(self, width, media_width, depth, num_latents, heads, head_dim):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.latents = nn.Parameter(torch.empty(num_latents, width))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    module(
                        norm_media=nn.LayerNorm(media_width),
                        norm_latents=nn.LayerNorm(width),
                        to_q=nn.Linear(width, inner, bias=False),
                        to_kv=nn.Linear(media_width, 2 * inner, bias=False),
                        to_out=nn.Linear(inner, width, bias=False),
                    ),
                    nn.Sequential(
                        nn.LayerNorm(width),
                        nn.Linear(width, 4 * width, bias=False),
                        nn.GELU(),
                        nn.Linear(4 * width, width, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, media: Tensor) -> Tensor:
        """(tokens, media width) -> (latents, width)."""
        x = self.latents
        for attention, feed_forward in self.layers:
            keys, values = attention.to_kv(attention.norm_media(media)).chunk(2, -1)
            x = x + attention.to_out(attend(attention.to_q(attention.norm_latents(x)), keys, values, self.heads))
            x = x + feed_forward(x)
        return self.norm(x)


class RmsNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Adapter(nn.Module):
    def __init__(self, width, size):
        super().__init__()
        self.adapter_norm_before = nn.LayerNorm(width)
        self.adapter_down = nn.Linear(width, size)
        self.adapter_up = nn.Linear(size, width)
        self.scaling = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scaling * self.adapter_up(F.silu(self.adapter_down(self.adapter_norm_before(x))))


class LLM(nn.Module):
    def __init__(self, rows, width, hidden, depth, heads, frequency, adapter_size):
        super().__init__()
        self.heads = heads
        self.model = module(
            embed_tokens=nn.Embedding(rows, width),
            layers=nn.ModuleList(
                module(
                    input_layernorm=RmsNorm(width),
                    self_attn=module(**{f"{part}_proj": nn.Linear(width, width, bias=False) for part in "qkvo"}),
                    post_attention_layernorm=RmsNorm(width),
                    mlp=module(
                        gate_proj=nn.Linear(width, hidden, bias=False),
                        up_proj=nn.Linear(width, hidden, bias=False),
                        down_proj=nn.Linear(hidden, width, bias=False),
                    ),
                    **({} if layer % frequency else {"output_adapter": Adapter(width, adapter_size)}),
                )
                for layer in range(depth)
            ),
            norm=RmsNorm(width),
        )
        self.lm_head = nn.Linear(width, rows, bias=False)

    def rotated(self, x: Tensor) -> Tensor:
        """(tokens, width) with every head's halves turned by position times frequency."""
        half = x.shape[-1] // self.heads // 2
        angles = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(half) / half)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        turned = []
        for head in x.chunk(self.heads, -1):
            first, second = head.split(half, -1)
            turned += [first * cos - second * sin, second * cos + first * sin]
        return torch.cat(turned, -1)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, width) -> (tokens, rows)."""
        for layer in self.model.layers:
            y, attention = layer.input_layernorm(x), layer.self_attn
            q, k = self.rotated(attention.q_proj(y)), self.rotated(attention.k_proj(y))
            x = x + attention.o_proj(attend(q, k, attention.v_proj(y), self.heads, causal=True))
            y = layer.post_attention_layernorm(x)
            x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y))
            if hasattr(layer, "output_adapter"):
                x = layer.output_adapter(x)
        return self.lm_head(self.model.norm(x))


class ReferenceModel(nn.Module):
    """The released model at a size of one's own, its parameters drawn so that each of them shows in the logits."""

    def __init__(
        self, *, frequency=2, layers=5, grid=3, patch=4, blocks=2, width=32, media_width=24, rows=50, heads=4, frames=3
    ):
        super().__init__()
        torch.manual_seed(0)
        self.vision_encoder = VisionEncoder(media_width, 40, blocks, heads, patch, grid)
        self.LLM = LLM(rows, width, 44, layers, heads, frequency, width // 2)
        self.bridge = Bridge(width, media_width, 2, 6, heads=8, head_dim=64)
        self.absolute_frame_pos_embed = nn.Parameter(torch.empty(1, frames, 1, media_width))
        self.double()
        with torch.no_grad():
            for key, parameter in self.named_parameters():
                parameter.normal_(std=1.0 if "embed_tokens" in key else 0.15)
                if parameter.dim() == 1 and not key.endswith("bias"):  # the norms' weights and the adapters' scales
                    parameter += 0.7

    def features(self, frames: Tensor) -> Tensor:
        """(3, S, S) of an image or (F, 3, S, S) of a video -> (latents, width)."""
        if frames.dim() == 3:
            return self.bridge(self.vision_encoder(frames))
        media = torch.stack([self.vision_encoder(frame) for frame in frames]) + self.absolute_frame_pos_embed[0]
        return self.bridge(media.flatten(0, 1))

    def forward(self, frames: Tensor, ids: Tensor) -> Tensor:
        """Logits, (latents + text tokens, rows), of one sample."""
        return self.LLM(torch.cat([self.features(frames), self.LLM.model.embed_tokens(ids)]))

    def loss(self, frames: Tensor, ids: Tensor, supervised: int) -> Tensor:
        """The mean cross-entropy of the last ``supervised`` tokens."""
        return F.cross_entropy(self(frames, ids)[-supervised - 1 : -1], ids[-supervised:])

    @torch.no_grad()
    def search(self, frames: Tensor, ids: Tensor, steps: int, beams: int) -> list[int]:
        """The best continuation of ``steps`` tokens that a search with ``beams`` beams finds; 1 is greedy."""
        kept = [(0.0, ids)]
        for _ in range(steps):
            grown = []
            for score, row in kept:
                log_probabilities = self(frames, row)[-1].log_softmax(-1)
                grown += [
                    (score + log_probabilities[token].item(), torch.cat([row, token[None]]))
                    for token in log_probabilities.topk(beams).indices
                ]
            kept = sorted(grown, key=lambda each: -each[0])[:beams]
        return kept[0][1][len(ids) :].tolist()
