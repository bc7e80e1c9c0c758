"""Trains the tiny checkpoint: `python -m tests.zoo.train --out DIRECTORY`.

Three stages, all on pictures drawn as they are needed, so that none is ever seen twice. The
warm-up trains vision and projector to say what every patch shows, through a head that is thrown
away at the end; then the decoder learns to answer, and last all of it together. Workers of one
thread each share the gradient.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from tests.zoo import checkpoint
from tests.zoo.batches import Batch, batches
from tests.zoo.families import FAMILIES
from tests.zoo.families.base import Family
from tests.zoo.labels import classes
from tests.zoo.model import Config, Params, init_params
from tests.zoo.optimiser import Optimiser, Rates, is_eye
from tests.zoo.questions import TRAIN, draw_sample

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
    """What to train and for how long; `images` and `questions` are for each worker and step."""

    out: Path
    start: Path | None
    warmup: int
    head: int
    decoder: int
    together: int
    images: int
    questions: int
    workers: int
    seed: int
    pace: float
    family: str
    head_file: Path | None
    minutes: float


def patch_loss(
    family: Family, params: Params, batch: Batch, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """How well the image tokens tell what each of their patches shows.

    Returns:
        The loss, and the share of patches named rightly for each kind of label, empty ones aside.
    """
    counts = [classes(kind, family.side) for kind in family.label_kinds]
    logits = F.linear(tokens, params["head.weight"], params["head.bias"])
    logits = logits.view(*batch.labels.shape[:3], sum(counts))
    loss, scores = torch.zeros(()), []
    for i, part in enumerate(torch.split(logits, counts, -1)):
        target = batch.labels[..., i].flatten()
        weight = torch.ones(counts[i])
        # Nearly every patch is empty of characters and middles: keep that from drowning the rest.
        weight[0] = 0.1 if family.label_kinds[i] in ("character", "middle") else 1.0
        loss = loss + F.cross_entropy(part.flatten(0, 2), target, weight, ignore_index=-100)
        right = (part.flatten(0, 2).argmax(-1) == target)[target > 0]
        scores.append(right.float().mean())
    return loss, torch.stack(scores)


def answer_loss(
    family: Family, params: Params, config: Config, batch: Batch, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the answer tokens.

    Returns:
        The loss, and the share of answer tokens that come first.
    """
    at = batch.ids == family.image_id(config)
    x = F.embedding(batch.ids.masked_fill(at, 0), params[family.embedding()])
    x = x.masked_scatter(at[..., None], tokens)
    hidden = family.decode(params, config, x, batch.positions, batch.mask)
    asked = batch.targets >= 0
    logits = F.linear(hidden[asked], params[family.head()])
    target = batch.targets[asked]
    loss = F.cross_entropy(logits, target)
    return loss, (logits.argmax(-1) == target).float().mean()[None]


def stage_loss(
    name: str, family: Family, params: Params, config: Config, batch: Batch
) -> tuple[Tensor, Tensor]:
    """The loss of a stage and the shares to log: of answers, where asked, then of patches."""
    with torch.set_grad_enabled(name in ("warmup", "together")):
        tokens = family.image_tokens(params, config, batch.pixels)
    loss, shares = patch_loss(family, params, batch, tokens)
    if name in ("warmup", "head"):
        return loss, shares
    answers, right = answer_loss(family, params, config, batch, tokens)
    return answers + 0.2 * loss, torch.cat([right, shares])


@torch.no_grad()
def balance(family: Family, params: Params, config: Config, batch: Batch) -> None:
    """Scale the projector so that image tokens are of the size of word embeddings.

    The warm-up lets them grow more than tenfold; what the decoder's layers add would drown.
    """
    factor = 0.6 / family.image_tokens(params, config, batch.pixels).std()
    for name in family.outputs:
        params[name] *= factor
    params["head.weight"] /= factor


def rate_scale(step: int, progress: float) -> float:
    """Short rise, long plateau, then a straight line to zero over the last 60 per cent."""
    return min(1.0, (step + 1) / 30, (1 - progress) / 0.6)


def _agree(progress: float) -> float:
    """The largest of all workers' values: clocks differ, and all must stop at one step."""
    value = torch.tensor(progress)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


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


def _is_trained(stage: str, family: Family, name: str) -> bool:
    """Whether a stage changes a parameter."""
    if any(part in name for part in family.untrained):
        return False
    if name.startswith("head."):
        return True
    eye = stage in ("warmup", "together") and is_eye(name)
    return eye or (stage in ("decoder", "together") and not is_eye(name))


def _run_stage(
    plan: Plan,
    rank: int,
    family: Family,
    params: Params,
    config: Config,
    name: str,
    seconds: float,
) -> None:
    """Train `params` through one stage, for `seconds` at most; worker 0 logs and saves."""
    steps: int = getattr(plan, name)
    if not steps:
        return
    trained = {n: p for n, p in params.items() if _is_trained(name, family, n)}
    optimiser = Optimiser(trained, STAGES[name])
    seed = [TRAIN, plan.seed, 1 + list(STAGES).index(name), rank]
    questions = 0 if name in ("warmup", "head") else plan.questions
    tokens = family.train_tokenizer()
    source = batches(family, config, tokens, seed, plan.images, questions)
    began, recent = time.monotonic(), torch.zeros(0)
    mean = {n: p.detach().clone() for n, p in params.items()}
    for step in range(steps):
        loss, shares = stage_loss(name, family, params, config, next(source))
        loss.backward()  # type: ignore[no-untyped-call]
        _share(trained)
        spent = time.monotonic() - began
        progress = _agree(max(step / steps, spent / seconds))
        optimiser.step(plan.pace * rate_scale(step, min(progress, 1.0)))
        now = torch.cat([loss.detach()[None], shares.nan_to_num(1.0)])
        recent = now if not len(recent) else recent.lerp(now, 0.05)
        if rank == 0 and (step % 20 == 19 or step == steps - 1):
            figures = " ".join(f"{v:.3f}" for v in recent.tolist())
            print(f"{name} {step + 1}/{steps}: loss, shares {figures}; {spent:.0f} s", flush=True)
        _follow(mean, trained)
        if rank == 0 and step % 100 == 99:
            _save(plan.out, family, config, mean)
        if progress >= 1:
            break
    if name == "warmup":
        # The same batch on every worker, so that all scale alike.
        shared = batches(family, config, tokens, seed[:3], plan.images, 0)
        balance(family, params, config, next(shared))
    if rank == 0:
        _save(plan.out, family, config, params)


@torch.no_grad()
def _follow(mean: Params, trained: Params) -> None:
    """Move the running mean, which before the rates fall answers better than any one step."""
    for name, value in trained.items():
        mean[name].lerp_(value, 0.02)


def _save(out: Path, family: Family, config: Config, params: Params) -> None:
    weights = {n: p for n, p in params.items() if not n.startswith("head.")}
    checkpoint.write(out, family, config, weights)


def _new_head(family: Family, width: int) -> Params:
    """The warm-up's own head."""
    patches = _patches_per_token(family)
    count = patches * sum(classes(kind, family.side) for kind in family.label_kinds)
    weight = torch.randn(count, width, generator=torch.Generator().manual_seed(1)) * 0.05
    return {"head.weight": weight, "head.bias": torch.zeros(count)}


def _patches_per_token(family: Family) -> int:
    scene = draw_sample(TRAIN, 0).scene
    return int(family.patch_labels(scene, family.pixels(scene.image)).shape[2])


def _worker(rank: int, plan: Plan, meeting: str) -> None:
    torch.set_num_threads(1)
    began = time.monotonic()
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=plan.workers
    )
    if plan.start is None:
        family = FAMILIES[plan.family]
        config = family.config(family.train_tokenizer())
        params = init_params(family.param_shapes(config), plan.seed)
    else:
        family, config, params, _ = checkpoint.read(plan.start)
    if rank == 0:
        print(f"{family.name}: {sum(p.numel() for p in params.values())} parameters", flush=True)
    head = plan.head_file
    width = params[family.embedding()].shape[1]
    params |= load_file(head) if head and head.exists() else _new_head(family, width)
    for value in params.values():
        value.requires_grad_()
    for name in STAGES:
        left = 60 * plan.minutes - (time.monotonic() - began)
        seconds = max(left, 1.0) if name == "together" else math.inf
        _run_stage(plan, rank, family, params, config, name, seconds)
        if rank == 0 and head:
            save_file({n: p.detach() for n, p in params.items() if n.startswith("head.")}, head)
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
    parser.add_argument("--images", type=int, default=48, help="pictures, or tiles of them")
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pace", type=float, default=1.0, help="factor on all learning rates")
    parser.add_argument("--family", choices=list(FAMILIES), default="smolvlm")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="time for all, at the last stage's cost"
    )
    parser.add_argument("--head-file", type=Path, help="keeps the warm-up's head between runs")
    plan = Plan(**vars(parser.parse_args()))
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"{folder}/meeting"
        spawn(_worker, (plan, meeting), plan.workers)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
