"""The student written down plainly: every expert on every token, one process, nothing clever."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_cpd.student.backbones._transformer import Block
from hpc_cpd.student.network import Student, StudentShape


def small_shape(top_k: int = 0, **changes: Any) -> StudentShape:
    """`changes`: of the shape, or of its Transformer."""
    values = {
        "observation_size": 6,
        "action_size": 3,
        "task_vector_size": 5,
        "width": 16,
        "layers": 1,
        "mixtures": 1,
        "heads": 2,
        "history": 4,
        "expert_hidden": 12,
        "shared_expert_hidden": 0,
        "experts_see_observation": True,
        "top_k": top_k,
        "initial_gate_bias": -5.0,
        **changes,
    }
    transformer = {name: values.pop(name) for name in ("layers", "mixtures", "heads")}
    return StudentShape.model_validate({"backbone": transformer, **values})


def make_student(
    shape: StudentShape,
    experts_by_stage: list[list[int]],
    expert_parallel_size: int = 1,
    for_training: bool = True,
    opinion: float = 0.5,
) -> Student:
    """A student whose gate has opinions, by default strong: routing is uneven and not decided by rounding."""
    student = Student(shape, experts_by_stage, expert_parallel_size, seed=3, for_training=for_training)
    with torch.no_grad():
        for name, value in student.gate_parameters():
            generator = torch.Generator().manual_seed(len(name) + value.numel())
            value.add_(torch.empty_like(value).normal_(0.0, opinion, generator=generator))
    return student


def make_batch(rows: int, length: int, shape: StudentShape) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(observations, task vectors, valid, override, target) of `rows` windows."""
    generator = torch.Generator().manual_seed(rows)
    observations = torch.randn(rows, length, shape.observation_size, generator=generator)
    tasks = F.normalize(torch.randn(rows, shape.task_vector_size, generator=generator), dim=1)
    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    valid = torch.arange(length) < lengths[:, None]
    override = torch.rand(rows, generator=generator) < 0.5
    target = torch.randn(rows, length, shape.action_size, generator=generator)
    return observations, tasks, valid, override, target


def reference_forward(
    student: Student, observations: Tensor, tasks: Tensor, valid: Tensor, override: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(actions [B, L, act], load-balancing loss) of a student that lives whole in this process."""
    shape = student.shape
    length = valid.shape[1]
    told = tasks[:, None].expand(-1, length, -1)
    tokenizer, backbone = student.tokenizer, student.backbone
    normalised = (observations - tokenizer.observation_mean) / tokenizer.observation_std
    tokens = tokenizer.embed_observation(normalised) + tokenizer.embed_task(told)
    seen = [normalised] if shape.experts_see_observation else []
    looked_at = torch.tensor([[any(row[place:]) for place in range(length)] for row in valid.tolist()]).view_as(valid)
    balances = []
    for number, block in enumerate(backbone.blocks):
        tokens = reference_block(block, tokens)
        place = number - (len(backbone.blocks) - backbone.mixtures)
        if place >= 0:
            features = backbone.norms_features[place](tokens)
            inputs = torch.cat([features, *seen, told], dim=-1)
            served = valid if number == len(backbone.blocks) - 1 else looked_at
            mixed, balance = reference_mixture(student, place, inputs, served, override)
            tokens = features + mixed
            balances.append(balance)
    return student.head(backbone.final_norm(tokens)), torch.stack(balances).mean()


def reference_block(block: Block, tokens: Tensor) -> Tensor:
    """A Transformer block with its attention written out, head by head and query by query."""
    _, length, width = tokens.shape
    size = width // block.heads
    query, key, value = block.query_key_value(block.norm_attention(tokens)).split(width, dim=-1)
    attended = torch.zeros_like(tokens)
    for head in range(block.heads):
        part = slice(head * size, (head + 1) * size)
        for now in range(length):
            places = range(max(0, now - block.window + 1), now + 1)
            # only the distance counts: the query stays, the key turns back by how long ago it was
            scores = [(query[:, now, part] * turned(key[:, then, part], then - now)).sum(-1) for then in places]
            weights = (torch.stack(scores, dim=-1) / size**0.5).softmax(dim=-1)
            attended[:, now, part] = (weights[:, :, None] * value[:, places.start : places.stop, part]).sum(dim=1)
    tokens = tokens + block.attention_out(attended)
    return tokens + block.feed_forward_out(F.gelu(block.feed_forward_in(block.norm_feed_forward(tokens))))


def turned(vectors: Tensor, angle: int) -> Tensor:
    """Number i and number i + half of each vector, as a complex number, times exp(1j * angle / 100^(i / half))."""
    half = vectors.shape[-1] // 2
    angles = angle / 100.0 ** (torch.arange(half) / half)
    plane = torch.complex(vectors[..., :half], vectors[..., half:]) * torch.polar(torch.ones(half), angles)
    return torch.cat([plane.real, plane.imag], dim=-1)


def reference_mixture(
    student: Student, place: int, inputs: Tensor, valid: Tensor, override: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(outputs [B, L, width], load-balancing loss) of one mixture."""
    shape, mixture = student.shape, student.mixtures[place]
    length = valid.shape[1]
    tokens = inputs.flatten(0, 1)
    stages = [stage for stage, ids in enumerate(student.experts_by_stage, start=1) if ids]
    weight = torch.cat([getattr(mixture.gate, f"weight_{stage}") for stage in stages])
    bias = torch.cat([getattr(mixture.gate, f"bias_{stage}") for stage in stages])
    logits = tokens @ weight.T + bias
    probability = logits.softmax(dim=1)
    experts = weight.shape[0]
    outputs = torch.stack([mixture.experts[str(e)](tokens) for e in mixture.ids], dim=1)
    flat_valid = valid.reshape(-1)
    if shape.top_k in (0, experts) or shape.top_k > experts:
        weights, load = probability, probability.detach()
    else:
        chooser = logits.detach().clone()
        if override is not None and len(stages) > 1:
            newest = len(student.experts_by_stage[stages[-1] - 1])
            flagged = override[:, None].expand(-1, length).reshape(-1)
            chooser[flagged, experts - newest :] -= shape.initial_gate_bias
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chooser.topk(shape.top_k).indices, True)
        wished = torch.zeros_like(chosen).scatter(1, logits.topk(shape.top_k).indices, True)
        load = wished.float() / shape.top_k
        masked = probability * chosen
        if shape.top_k == 1:  # value one, gradient of log p
            weights = chosen * (1.0 + masked.clamp_min(1e-30).log() - masked.clamp_min(1e-30).log().detach())
        else:
            weights = masked / masked.sum(dim=1, keepdim=True)
    mixed = (outputs * weights[:, :, None]).sum(dim=1)
    if mixture.shared is not None:
        mixed = mixed + mixture.shared(tokens)
    balance = experts * (load[flat_valid].mean(dim=0) * probability[flat_valid].mean(dim=0)).sum()
    return (mixed * flat_valid[:, None]).view(*valid.shape, -1), balance


def masked_loss(actions: Tensor, target: Tensor, valid: Tensor, count: float) -> Tensor:
    """Sum of squared errors over valid positions, divided by `count`."""
    return ((actions - target).square().sum(dim=2) * valid).sum() / count
