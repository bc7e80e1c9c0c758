"""Trains the tiny checkpoint: `python -m tests.zoo.train --out DIRECTORY`.

Three stages, all on pictures drawn as they are needed, so that none is ever seen twice. The
warm-up trains vision and projector to say what every patch shows, through a head that is thrown
away at the end; then the decoder learns to answer, and last all of it together. Workers of one
thread each share the gradient.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from tests.zoo import checkpoint
from tests.zoo.batches import HEADS, Batch, batches
from tests.zoo.model import Params, decode, encode_patches, init_params, project
from tests.zoo.optimiser import Optimiser, Rates
from tests.zoo.questions import TRAIN
from tests.zoo.tokenizer import train_tokenizer

STAGES = {
    "warmup": Rates(muon=0.02, adam=3e-3),
    "head": Rates(muon=0.0, adam=3e-3),
    "decoder": Rates(muon=0.01, adam=2e-3),
    "together": Rates(muon=0.004, adam=1e-3, vision=0.5),
}
"""In this order. Answers alone, at the decoder's rates, wipe out within a few hundred steps what
the warm-up taught the vision transformer; hence frozen vision first, then slow steps, with the
warm-up's loss kept beside the answers'. The head's own stage is for going on from a checkpoint,
where the head is new and would otherwise pull the vision transformer about.
"""


@dataclass(frozen=True)
class Plan:
    """What to train and for how long; `tiles` and `questions` are for each worker and step."""

    out: Path
    start: Path | None
    warmup: int
    head: int
    decoder: int
    together: int
    tiles: int
    questions: int
    workers: int
    seed: int


def patch_loss(
    params: Params, config: checkpoint.Config, batch: Batch, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """How well the image tokens tell what each of their patches shows.

    Returns:
        The loss, and the share of patches named rightly for each of `HEADS`, empty ones aside.
    """
    labels = _by_token(batch.labels, config["scale_factor"])
    logits = F.linear(tokens, params["head.weight"], params["head.bias"])
    logits = logits.view(*labels.shape[:3], sum(HEADS))
    loss, scores = torch.zeros(()), []
    for i, part in enumerate(torch.split(logits, list(HEADS), -1)):
        target = labels[..., i].flatten()
        weight = torch.ones(HEADS[i])
        # Nearly every patch is empty of characters and middles: keep that from drowning the rest.
        weight[0] = 0.1 if i in (2, 3) else 1.0
        loss = loss + F.cross_entropy(part.flatten(0, 2), target, weight, ignore_index=-100)
        right = (part.flatten(0, 2).argmax(-1) == target)[target > 0]
        scores.append(right.float().mean())
    return loss, torch.stack(scores)


def answer_loss(
    params: Params, config: checkpoint.Config, batch: Batch, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the answer tokens.

    Returns:
        The loss, and the share of answer tokens that come first.
    """
    x = F.embedding(batch.ids, params["model.text_model.embed_tokens.weight"])
    at = batch.ids == config["image_token_id"]
    x = x.masked_scatter(at[..., None], tokens)
    hidden = decode(params, config, x, batch.positions, batch.mask)
    asked = batch.targets >= 0
    logits = F.linear(hidden[asked], params["lm_head.weight"])
    target = batch.targets[asked]
    loss = F.cross_entropy(logits, target)
    return loss, (logits.argmax(-1) == target).float().mean()[None]


def stage_loss(
    name: str, params: Params, config: checkpoint.Config, batch: Batch
) -> tuple[Tensor, Tensor]:
    """The loss of a stage and the shares to log: of answers, where asked, then of patches."""
    with torch.set_grad_enabled(name in ("warmup", "together")):
        tokens = project(params, config, encode_patches(params, config, batch.tiles))
    loss, shares = patch_loss(params, config, batch, tokens)
    if name in ("warmup", "head"):
        return loss, shares
    answers, right = answer_loss(params, config, batch, tokens)
    return answers + 0.2 * loss, torch.cat([right, shares])


@torch.no_grad()
def balance(params: Params, config: checkpoint.Config, batch: Batch) -> None:
    """Scale the projector so that image tokens are of the size of word embeddings.

    The warm-up lets them grow more than tenfold; what the decoder's layers add would drown.
    """
    tokens = project(params, config, encode_patches(params, config, batch.tiles))
    factor = 0.6 / tokens.std()
    params["model.connector.modality_projection.proj.weight"] *= factor
    params["head.weight"] /= factor


def rate_scale(step: int, steps: int) -> float:
    """Short rise, long plateau, then a straight line to zero over the last 60 per cent."""
    return min(1.0, (step + 1) / 30, (steps - step) / (0.6 * steps))


def _by_token(labels: Tensor, scale: int) -> Tensor:
    """Labels [B, P, 4] as [B, N, scale * scale, 4], in the order of the pixel shuffle."""
    grid = round(labels.shape[1] ** 0.5)
    x = labels.view(-1, grid // scale, scale, grid // scale, scale, labels.shape[-1])
    return x.transpose(2, 3).reshape(len(labels), -1, scale * scale, labels.shape[-1])


def _share(params: Params) -> None:
    """Replace every gradient by its mean over the workers, and bound its length."""
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params.values()]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    flat *= (1.0 / torch.linalg.vector_norm(flat).clamp(min=1.0)).item()
    chunks = torch.split(flat, [g.numel() for g in grads])
    for param, chunk in zip(params.values(), chunks, strict=True):
        param.grad = chunk.view_as(param)


def _trained(name: str, params: Params) -> Params:
    """The parameters that a stage changes."""
    idle = {
        "warmup": ("lm_head.", ".text_model."),
        "head": ("lm_head.", "model."),
        "decoder": (".vision_model.", ".connector."),
        "together": (),
    }
    return {n: p for n, p in params.items() if not any(i in n for i in idle[name])}


def _run_stage(plan: Plan, rank: int, params: Params, config: checkpoint.Config, name: str) -> None:
    """Train `params` through one stage; worker 0 logs and saves."""
    steps: int = getattr(plan, name)
    if not steps:
        return
    trained = _trained(name, params)
    optimiser = Optimiser(trained, STAGES[name])
    seed = [TRAIN, plan.seed, 1 + list(STAGES).index(name), rank]
    questions = 0 if name in ("warmup", "head") else plan.questions
    source = batches(config, train_tokenizer(), seed, plan.tiles, questions)
    began, recent = time.monotonic(), torch.zeros(0)
    mean = {n: p.detach().clone() for n, p in params.items()}
    for step in range(steps):
        loss, shares = stage_loss(name, params, config, next(source))
        loss.backward()  # type: ignore[no-untyped-call]
        _share(trained)
        optimiser.step(rate_scale(step, steps))
        now = torch.cat([loss.detach()[None], shares.nan_to_num(1.0)])
        recent = now if not len(recent) else recent.lerp(now, 0.05)
        if rank == 0 and (step % 20 == 19 or step == steps - 1):
            figures = " ".join(f"{v:.3f}" for v in recent.tolist())
            spent = time.monotonic() - began
            print(f"{name} {step + 1}/{steps}: loss, shares {figures}; {spent:.0f} s", flush=True)
        _follow(mean, trained)
        if rank == 0 and step % 100 == 99:
            _save(plan.out, config, mean)
    if name == "warmup":
        # The same batch on every worker, so that all scale alike.
        balance(params, config, next(batches(config, train_tokenizer(), seed[:3], plan.tiles, 0)))
    if rank == 0:
        _save(plan.out, config, params)


@torch.no_grad()
def _follow(mean: Params, trained: Params) -> None:
    """Move the running mean, which before the rates fall answers better than any one step."""
    for name, value in trained.items():
        mean[name].lerp_(value, 0.02)


def _save(out: Path, config: checkpoint.Config, params: Params) -> None:
    checkpoint.write(out, config, {n: p for n, p in params.items() if not n.startswith("head.")})


def _worker(rank: int, plan: Plan, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=plan.workers
    )
    if plan.start is None:
        config = checkpoint.tiny_config(train_tokenizer())
        params = init_params(config, plan.seed)
    else:
        config, params, _ = checkpoint.read(plan.start)
    width = config["text_config"]["hidden_size"]
    classes = config["scale_factor"] ** 2 * sum(HEADS)
    head = torch.randn(classes, width, generator=torch.Generator().manual_seed(1)) * 0.05
    params |= {"head.weight": head, "head.bias": torch.zeros(classes)}
    for value in params.values():
        value.requires_grad_()
    if rank == 0:
        print(f"{sum(p.numel() for p in params.values()) - head.numel() - classes} parameters")
    for name in STAGES:
        _run_stage(plan, rank, params, config, name)
    dist.destroy_process_group()


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--warmup", type=int, default=1000, help="steps of the warm-up")
    parser.add_argument("--head", type=int, default=0, help="steps of the head alone")
    parser.add_argument("--decoder", type=int, default=600, help="steps of the decoder alone")
    parser.add_argument("--together", type=int, default=1200, help="steps of the last stage")
    parser.add_argument("--tiles", type=int, default=48)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    plan = Plan(**vars(parser.parse_args()))
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"{folder}/meeting"
        spawn(_worker, (plan, meeting), plan.workers)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
