"""Generate series: s_M -> s -> z_q -> x^ (thesis 0.2.2), and measure how good they are.

    python sample.py
    python sample.py --evaluate
    python sample.py --impute 40:70

Leaves in the run folder: metrics.json, and samples.npz (x (n,C,L) in the data's own units, y (n)
the names of their classes, "" without one, s (n,N)), samples.png, decoding.png; or imputed.npz
(x (n,10,C,END-START)) and imputed.png.
Notation as in vqvae.py and maskgit.py. The metrics' networks are trained here, on the data set's
own training split; so their values compare with each other, not with those of other weights.
"""

import argparse
import math
import time
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib import style
from matplotlib.figure import Figure
from tqdm import tqdm

import data
from maskgit import SCHEDULES, MaskGIT, decode, guided
from vqvae import VQVAE

style.use(["tableau-colorblind10", {"text.parse_math": False}])  # a class may be called $

N_FILLINGS = 10  # of each series to impute


def flags():
    """The command line."""
    parser = argparse.ArgumentParser(description="Generate series from a trained run.")
    add = parser.add_argument_group("what to draw").add_argument
    add("--n", type=data.number(int, 1, 10**6), default=1000, help="series (default 1000)")
    add("--label", default="all", help="a class; all: as often as in training; none: unconditional "
        "(default all)")
    add("--impute", type=stretch, metavar="START:END",
        help="instead, refill this stretch of n test series, without their labels")
    add("--evaluate", action="store_true", help="FID, inception score, CAS and novelty as well")
    add("--fcn-steps", type=data.number(int, 1),
        help="training steps, of batch 64, of each classifier behind --evaluate (default 1000)")
    add = parser.add_argument_group("decoding").add_argument
    add("--prior", choices=("maskgit", "uniform"), default="maskgit",
        help="uniform draws every code alike, as this part of the thesis did (default maskgit)")
    add("--steps", type=data.number(int, 1, 100), default=10, help="T (default 10)")
    add("--schedule", choices=SCHEDULES, default="cosine", help="gamma(t/T) (default cosine)")
    add("--temperature", type=data.number(float, 0), default=1.0, help="of tokens (default 1)")
    add("--choice-temperature", type=data.number(float, 0), default=8.0,
        help="of the order in which entries are settled (default 8; MaskGIT 4.5)")
    add("--revisions", type=data.number(int, 0, 100), default=8,
        help="rounds that redraw a quarter, improbable entries first (default 8; MaskGIT has none)")
    add("--guidance", type=data.number(float, 0, 100), default=1.0,
        help="scale; 1 is none (default 1)")
    add("--noise", type=data.number(float, 0, 100), default=1.0,
        help="Gaussian noise on x^, in units of the decoder's deviation (default 1; published 0)")
    return data.run_flags(parser, trains=False)


def stretch(text):
    """argparse type of START:END."""
    start, end = (int(part) for part in text.split(":"))
    if not 0 <= start < end:
        raise argparse.ArgumentTypeError(f"{text}: START must be below END, and neither negative")
    return start, end


def uniform(s_M, K):
    """Logits (B,N,K) of the prior that this part of the thesis used: every code alike."""
    # NOTE(differs): the follow-up's learned prior is the default here
    return torch.zeros(*s_M.shape, K, device=s_M.device)


def generate(vqvae, prior, y, s_M, args):
    """s_M (B,N) decoded under labels y (B) or None -> s (B,N), x (B,C,L), canvases of row 0.

    args: the flags of `decoding`; prior: None for the uniform one.
    """
    parts, K = [], len(vqvae.quantiser.codes)
    size = 128 if s_M.device.type == "cpu" else 1000  # 128 series stay in a CPU's cache
    for i in tqdm(range(0, len(s_M), size), desc="decoding", leave=False):
        labels = None if y is None else y[i : i + size]
        logits_fn = guided(prior, labels, args.guidance) if prior else partial(uniform, K=K)
        canvases = decode(logits_fn, s_M[i : i + size], K, args.steps, args.schedule,
                          args.temperature, args.choice_temperature, args.revisions)
        x = vqvae.detokenise(canvases[-1], args.noise)
        parts.append((canvases[-1].clone(), x, canvases[:, 0].clone()))  # lets the rest go
    s, x, canvases = zip(*parts)
    return torch.cat(s), torch.cat(x), canvases[0]


def train_fcn(x, y, n_classes, n_steps, name):
    """Fully convolutional classifier (Wang et al. 2017) trained on x (B,C,L), y (B), in eval mode.

    x -> logits (B,classes); without its last layer, fcn[:-1], x -> the 128 pooled features.
    """
    layers = []
    for C, D, kernel in ((x.shape[1], 128, 8), (128, 256, 5), (256, 128, 3)):
        layers += [nn.ZeroPad1d(((kernel - 1) // 2, kernel // 2)), nn.Conv1d(C, D, kernel)]
        layers += [nn.BatchNorm1d(D), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(128, n_classes)]
    fcn = nn.Sequential(*layers).to(x.device)
    optimiser = torch.optim.AdamW(fcn.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
    for _ in tqdm(range(n_steps), desc=f"classifier on {name}", leave=False):
        rows = torch.randint(len(x), (min(64, len(x)),), device=x.device)
        optimiser.zero_grad()
        F.cross_entropy(fcn(x[rows]), y[rows]).backward()
        optimiser.step()
        schedule.step()
    return fcn.eval()


def frechet_distance(a, b):
    """FID of features a (n,D), b (m,D): |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2}).

    (Heusel et al. 2017.) With S = R^T R, tr (S_a S_b)^{1/2} is the nuclear norm of R_a R_b^T: real,
    also where features are rank-deficient.
    """
    a, b = a.double(), b.double()
    R_a, R_b = (torch.linalg.qr(v - v.mean(0), mode="r").R / (len(v) - 1) ** 0.5 for v in (a, b))
    cross = torch.linalg.matrix_norm(R_a @ R_b.T, "nuc")
    shift = a.mean(0) - b.mean(0)
    return (shift.square().sum() + R_a.square().sum() + R_b.square().sum() - 2 * cross).item()


def inception_score(logits):
    """exp of the mean KL of p(y|x) from p(y) (Salimans et al. 2016); 1..classes."""
    log_p = logits.double().log_softmax(1)
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))
    return (log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item()


def nearest_distance(x, x_train):
    """Mean distance of each x (B,C,L) to its nearest training series."""
    x_train = x_train.flatten(1)
    return data.in_batches(lambda x: torch.cdist(x.flatten(1), x_train).amin(1), x).mean().item()


def evaluate(vqvae, d, x, y, args):
    """FID, inception score and CAS of the real data, its reconstructions and generated x, y.

    real: FID of one half of the test split from the other (fewer series, so no lower bound), CAS of
    the training split. reconstructed: what the tokens allow, of both splits reconstructed.
    novelty: mean distance of generated series to their nearest training series over that of the
    reconstructed test split (1 as new as these, 0 copies).
    """
    def reconstruct(rows):
        return vqvae.detokenise(vqvae.tokenise(rows), args.noise)

    x_rec, x_train_rec = (data.in_batches(reconstruct, rows) for rows in (d.x_test, d.x_train))
    n_classes, n_steps = len(d.classes), args.fcn_steps or 1000
    fcn = train_fcn(d.x_train, d.y_train, n_classes, n_steps, "real")
    real = data.in_batches(fcn[:-1], d.x_test)
    halves = real[torch.randperm(len(real), device=real.device)].chunk(2)
    metrics = {}
    for name, sample, train_x, train_y in (
        ("real", d.x_test, d.x_train, d.y_train),
        ("reconstructed", x_rec, x_train_rec, d.y_train),
        ("generated", x, x, y),
    ):
        judge = fcn if name == "real" else train_fcn(train_x, train_y, n_classes, n_steps, name)
        a, b = halves if name == "real" else (real, data.in_batches(fcn[:-1], sample))
        is_right = data.in_batches(judge, d.x_test).argmax(1) == d.y_test
        metrics[f"fid_{name}"] = frechet_distance(a, b)
        metrics[f"inception_{name}"] = inception_score(data.in_batches(fcn, sample))
        metrics[f"cas_{name}"] = is_right.float().mean().item()
    metrics["novelty"] = nearest_distance(x, d.x_train) / nearest_distance(x_rec, d.x_train)
    return metrics


def draw_samples(run, d, x, y):
    """Real series above generated ones, the same axes, a column a class, at most 10."""
    columns = range(min(10, len(d.classes))) if y is not None else [None]
    figure = Figure(figsize=(max(5, 2.3 * len(columns)), 5.4), layout="constrained")
    axes = figure.subplots(6, len(columns), sharex=True, sharey=True, squeeze=False)
    for column, c in enumerate(columns):
        for half, (v, labels) in enumerate(((d.x_test, d.y_test), (x, y))):
            rows = v if c is None else v[labels == c]
            for i, row in enumerate(rows[:: max(1, len(rows) // 3)][:3]):
                axes[3 * half + i, column].plot(row[0].cpu(), lw=1, color=("0.3", "C0")[half])
        axes[0, column].set_title("all" if c is None else f"class {d.classes[c]}", fontsize=10)
        axes[-1, column].set_xlabel("time step")
    for row, axis in enumerate(axes[:, 0]):
        axis.set_ylabel("real" if row < 3 else "generated", fontsize=9)
    figure.supylabel("x, scaled", fontsize=9)
    data.write(run / "samples.png", figure.savefig)


def draw_decoding(run, canvases, n_steps, grid, K):
    """The token grid of one series after each step and revision; white is [MASK]."""
    columns = min(7, len(canvases))
    rows = math.ceil(len(canvases) / columns)
    figure = Figure(figsize=(1.4 * columns, 1.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for t, (axis, s) in enumerate(zip(axes, canvases)):
        s = np.ma.masked_equal(s.view(grid).cpu().numpy(), K)
        axis.imshow(s, vmin=0, vmax=K - 1, origin="lower", cmap="viridis", aspect="auto")
        name = f"{t}: {(s.data == K).sum()} masked" if t <= n_steps else "revised"
        axis.set_title(name, fontsize=8)
    figure.supxlabel("time (column of the grid)", fontsize=9)
    figure.supylabel("frequency (row)", fontsize=9)
    data.write(run / "decoding.png", figure.savefig)


def impute(run, vqvae, prior, d, args):
    """Refill x[start:end] of the first n test series N_FILLINGS times; errors against the truth."""
    start, end = args.impute
    x = d.x_test[: args.n]
    # tokens outside the stretch see into it: a straight line stands there instead of the truth
    line = torch.linspace(0, 1, end - start + 2, device=x.device)[1:-1]
    before, after = x[..., start - 1 : start], x[..., end : end + 1]  # one is empty at a border
    ends = (before if start else after), (after if end < vqvae.L else before)
    hidden = torch.cat([x[..., :start], torch.lerp(*ends, line), x[..., end:]], -1)

    (n_rows, n_columns), K = vqvae.grid, len(vqvae.quantiser.codes)
    # samples of each column: frames are centred at multiples of hop
    first = torch.arange(n_columns, device=x.device) * vqvae.stride - vqvae.hop / 2
    last = first + vqvae.stride
    last[-1] = vqvae.L  # halving drops odd columns, so the rest is the last one's
    is_touched = ((first < end) & (last > start)).repeat(n_rows)
    s_M = data.in_batches(vqvae.tokenise, hidden).masked_fill(is_touched, K)
    _, filled, _ = generate(vqvae, prior, None, s_M.repeat_interleave(N_FILLINGS, 0), args)
    filled = filled.view(len(x), N_FILLINGS, *x.shape[1:])[..., start:end]
    x_own = (filled * d.std + d.mean).cpu()  # in the data's own units
    data.write(run / "imputed.npz", partial(np.savez_compressed, x=x_own))
    draw_fillings(run, x, filled, hidden, start, end)
    truth = x[:, None, :, start:end]
    return {
        "mse_one_filling": F.mse_loss(filled, truth.expand_as(filled)).item(),
        "mse_mean_filling": F.mse_loss(filled.mean(1, keepdim=True), truth).item(),
        "mse_straight_line": F.mse_loss(hidden[:, None, :, start:end], truth).item(),
    }


def draw_fillings(run, x, filled, hidden, start, end):
    """Truth, fillings (B,fillings,C,end-start), their spread and a straight line, for 3 series."""
    n_rows = min(3, len(x))
    figure = Figure(figsize=(9, 1.4 * n_rows + 0.6), layout="constrained")
    t = range(start, end)
    for i, axis in enumerate(figure.subplots(n_rows, 1, sharex=True, squeeze=False)[:, 0]):
        one = filled[i, :, 0].cpu().numpy()
        axis.plot(x[i, 0].cpu(), color="0.6", lw=1, label="truth")
        axis.plot(t, one.T, color="C0", lw=0.5)
        axis.fill_between(t, one.min(0), one.max(0), color="C0", alpha=0.25, label="fillings")
        axis.plot(t, one.mean(0), color="C1", label="their mean")
        axis.plot(t, hidden[i, 0, start:end].cpu(), color="k", ls=":", label="straight line")
        axis.set_ylabel("x, scaled")
    axis.set_xlabel("time step")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=4, loc="outside upper center")
    data.write(run / "imputed.png", figure.savefig)


if __name__ == "__main__":
    parser = flags()
    args = parser.parse_args()
    device = data.begin(args.seed, args.device)
    run = args.run or data.newest_run("stage2.pt" if args.prior == "maskgit" else "stage1.pt")
    stage1 = data.load_checkpoint(run / "stage1.pt", stage=1)
    vqvae = data.rebuild(VQVAE, stage1["arguments"], stage1["model"], device)
    d = data.load_again(stage1, device)
    K, N = len(vqvae.quantiser.codes), math.prod(vqvae.grid)
    prior = None
    if args.prior == "maskgit":
        stage2 = data.load_checkpoint(run / "stage2.pt", stage=2)
        if not torch.equal(stage2["codes"], stage1["model"]["quantiser.codes"]):
            raise ValueError(f"{run}/stage2.pt was trained on the tokens of another stage1.pt")
        prior = data.rebuild(MaskGIT, stage2["arguments"], stage2["prior"], device)
    if args.label not in ("all", "none", *d.classes):
        parser.error(f"--label {args.label}: the classes are {', '.join(d.classes) or 'none'}")
    if args.impute and args.impute[1] > vqvae.L:
        parser.error(f"--impute ends at {args.impute[1]}, but the series have {vqvae.L} samples")
    if args.impute and (args.impute == (0, vqvae.L) or args.evaluate or args.label != "all"):
        parser.error("--impute takes a part of the series, and neither --label nor --evaluate")
    if args.prior == "uniform" and (args.evaluate or args.label not in ("all", "none")):
        parser.error("--prior uniform knows no classes: neither --label nor --evaluate")
    if args.guidance != 1 and (prior is None or args.impute or args.label == "none"):
        parser.error("--guidance works by labels; here none is used")
    if args.fcn_steps and not args.evaluate:
        parser.error("--fcn-steps is of the classifiers behind --evaluate, which is not given")
    if args.evaluate and (args.label != "all" or not d.classes or min(args.n, len(d.x_test)) < 4):
        parser.error("--evaluate needs labels and at least 4 series, of all classes, and 4 to test")

    if args.impute:
        data.report(run, "imputed", impute(run, vqvae, prior, d, args))
    else:
        y = d.y_train if prior is not None and args.label != "none" else None
        if y is not None:  # classes as often as in training
            y = y if args.label == "all" else y[y == d.classes.index(args.label)]
            y = y[torch.randint(len(y), (args.n,), device=device)]
        s_M = torch.full((args.n, N), K, device=device)
        began = time.perf_counter()
        s, x, canvases = generate(vqvae, prior, y, s_M, args)
        cost = data.cost(began, 1, args.n, device)
        cost["seconds"] = cost.pop("seconds_per_step")
        names = np.array(d.classes)[y.tolist()] if y is not None else np.full(args.n, "")
        x_own = (x * d.std + d.mean).cpu()  # in the data's own units
        data.write(run / "samples.npz", partial(np.savez_compressed, x=x_own, y=names, s=s.cpu()))
        draw_samples(run, d, x, y)
        draw_decoding(run, canvases, args.steps, vqvae.grid, K)
        metrics = evaluate(vqvae, d, x, y, args) if args.evaluate else {}
        data.report(run, "samples", metrics | cost)
