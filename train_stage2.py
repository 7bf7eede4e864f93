"""Stage 2: a MaskGIT prior over the tokens of a trained stage 1 (thesis 0.2).

Every training series is tokenised once under each of a few shifts, by the frozen VQ-VAE: x -> s;
then s -> s_M -> logits, cross-entropy on the masked entries.

    python train_stage2.py

Leaves in the run folder: stage2.pt, stage2.jsonl (a line an epoch), metrics.json and stage2.png.
Notation as in vqvae.py and maskgit.py. Muon is the optimiser of Jordan et al. 2024, with the step
size of Liu et al. 2025 (arXiv 2502.16982), so that one learning rate suits it and AdamW.
"""

import argparse
import math
import time

import torch
from matplotlib.figure import Figure

import data
from maskgit import (SCHEDULES, MaskGIT, guided, gumbel_like, mask_tokens, masked_cross_entropy,
                     nll_bound)
from vqvae import VQVAE

BOUND_DRAWS = 2  # per test series


def flags():
    """The command line, one hyperparameter a line."""
    parser = argparse.ArgumentParser(description="Train the prior over tokens (stage 2).")
    add = parser.add_argument_group("data").add_argument
    add("--shift", type=data.number(float, 0, 1), default=0.25,
        help="learn series shifted by up to this many columns, too (default 0.25; published 0)")
    add("--token-temperature", type=data.number(float, 0), default=0.0,
        help="t > 0 draws tokens anew each epoch from softmax(-distance^2/t) (default 0: nearest)")
    add = parser.add_argument_group("model").add_argument
    # NOTE(differs): the thesis reports that the cosine is best for images, MaskGIT trains by it
    add("--schedule", choices=SCHEDULES, default="linear",
        help="gamma(r) in training (default linear: half is masked on average; MaskGIT cosine)")
    add = parser.add_argument_group("optimisation").add_argument
    # NOTE(differs): published 1000
    add("--epochs", type=data.number(int, 1), default=280, help="default 280; published 1000")
    add("--batch-size", type=data.number(int, 1, 10**6), default=64, help="B (default 64)")
    add("--lr", type=data.number(float, 0, 1), default=5e-3,
        help="highest of the one-cycle schedules (default 5e-3; published 1e-3)")
    return data.run_flags(parser, trains=True)


def even_shifts(most):
    """At most 15 shifts, in samples, evenly spaced around 0 within -most..most."""
    step = max(1, most // 4)
    return range(-(most // step) * step, most + 1, step)


def draw_tokens(distance, temperature):
    """distance (B,N,K), squared, to the codes -> s (B,N) from softmax(-distance/temperature)."""
    return (gumbel_like(distance) - distance / temperature).argmax(-1)


def bound(prior, s, y):
    """Mean of `nll_bound` over BOUND_DRAWS draws for each row of s, in nats; prior in eval mode."""
    total = 0.0
    for i in [*range(0, len(s), 1000)] * BOUND_DRAWS:
        logits_fn = guided(prior, None if y is None else y[i : i + 1000])
        total += nll_bound(logits_fn, s[i : i + 1000], prior.mask_id).sum().item()
    return total / BOUND_DRAWS / len(s)


def draw_curves(run, log):
    """Loss and accuracy on the masked tokens over the epochs."""
    epoch, loss, accuracy = ([record[k] for record in log] for k in ("epoch", "loss", "accuracy"))
    left, right = Figure(figsize=(9, 3), layout="constrained").subplots(1, 2)
    left.plot(epoch, loss)
    left.set(xlabel="epoch", ylabel="cross-entropy, nats a masked token")
    right.plot(epoch, accuracy)
    right.set(xlabel="epoch", ylabel="accuracy on masked tokens", ylim=(0, 1))
    data.write(run / "stage2.png", left.figure.savefig)


if __name__ == "__main__":
    parser = flags()
    args = parser.parse_args()
    device = data.begin(args.seed, args.device)
    run = args.run or data.newest_run("stage1.pt")
    args, state = data.resume(parser, args, run / "stage2.pt", stage=2)

    stage1 = data.load_checkpoint(run / "stage1.pt", stage=1)
    codes = stage1["model"]["quantiser.codes"]
    if state and not torch.equal(state["codes"], codes):
        raise ValueError(f"{run}/stage1.pt has changed since {run}/stage2.pt was made from it")
    vqvae = data.rebuild(VQVAE, stage1["arguments"], stage1["model"], device)
    d = data.load_again(stage1, device)
    K, N = len(vqvae.quantiser.codes), math.prod(vqvae.grid)
    n = len(d.x_train)
    n_steps = math.ceil(n / args.batch_size)

    def tokens_or_distances(x):
        """s (B,N) of x, or with a temperature the distances (B,N,K) that s is drawn from."""
        distance = vqvae.quantiser.distances(vqvae.encode(x))
        return distance if args.token_temperature > 0 else distance.argmin(-1)

    # NOTE(differs): shifted series too, else the prior learns the training series by heart; it is
    # told the shift, so that it can draw unshifted ones
    shifts = even_shifts(int(args.shift * vqvae.stride))
    of_shift = torch.stack([  # (shifts,n,N) or (shifts,n,N,K)
        data.in_batches(tokens_or_distances, data.time_shift(d.x_train, by)) for by in shifts])

    arguments = dict(K=K, N=N, n_classes=len(d.classes), n_shifts=len(shifts))
    prior = MaskGIT(**arguments).to(device)
    # NOTE(differs): smaller batches, one cycle of the rate, and Muon for every matrix of the layers
    # (Q, K and V are stacked in one)
    matrices = [w for w in prior.layers.parameters() if w.ndim == 2]
    in_layers = set(matrices)
    others = [w for w in prior.parameters() if w not in in_layers]
    muon = torch.optim.Muon(matrices, args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, args.lr, (0.9, 0.95), weight_decay=0.1, fused=True)
    schedules = [data.one_cycle(optimiser, args.epochs * n_steps) for optimiser in (muon, adamw)]
    parts = dict(prior=prior, muon=muon, adamw=adamw, muon_schedule=schedules[0],
                 adamw_schedule=schedules[1])
    constants = dict(stage=2, arguments=arguments, codes=codes)
    log = data.restore(state, parts)

    began, first_epoch = time.perf_counter(), len(log)
    for epoch in data.epochs(run, parts, vars(args), log, constants):
        losses = []
        shift = torch.randint(len(shifts), (n,), device=device)  # one for each series
        s_train = of_shift[shift, torch.arange(n, device=device)]
        if args.token_temperature > 0:
            s_train = draw_tokens(s_train, args.token_temperature)
        for rows in torch.randperm(n, device=device).split(args.batch_size):
            s = s_train[rows]
            y = d.y_train[rows] if d.classes else None
            is_masked = mask_tokens(s, args.schedule)
            logits = prior(s.masked_fill(is_masked, K), y, shift[rows])
            loss = masked_cross_entropy(logits, s, is_masked)
            prior.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
            for part in (muon, adamw, *schedules):
                part.step()
            is_right = (logits.detach().argmax(-1) == s) & is_masked
            losses.append(torch.stack([loss.detach(), is_right.sum() / is_masked.sum(), norm]))
        log.append(data.finite_means(losses, ["loss", "accuracy", "gradient_norm"], epoch, run))
    cost = data.cost(began, n_steps * (args.epochs - first_epoch), n / n_steps, device)

    prior.eval()
    nats = bound(prior, data.in_batches(vqvae.tokenise, d.x_test), d.y_test)
    draw_curves(run, log)
    data.report(run, "stage2", {"test_nats_per_series": nats, "test_nats_per_token": nats / N,
                                "uniform_nats_per_token": math.log(K)} | cost)
