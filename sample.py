"""Generate series: s_M -> s -> z_q -> x^ (thesis 0.2.2), and measure how good they are.

    python sample.py
    python sample.py --evaluate
    python sample.py --impute 40:70

Leaves in the run folder: metrics.json; samples.png and samples.npz (x (n,C,L) in the data's own
units, class names y (n), "" without one, s (n,N)), or imputed.npz (x (n,10,C,END-START)).
Notation as in vqvae.py and maskgit.py. The metrics' networks are trained here; so their values
compare with each other, not with those of other weights.
"""

import argparse
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

import data
from maskgit import MaskGIT, decode, guided, revise
from vqvae import VQVAE


def stretch(text):
    """argparse type of START:END."""
    start, end = (int(part) for part in text.split(":"))
    if not 0 <= start < end:
        raise argparse.ArgumentTypeError(f"{text}: START must be below END, and neither negative")
    return start, end


def flags():
    """The command line, one hyperparameter a line."""
    parser = data.command_line("Generate series from a trained run.", trains=False)
    group = parser.add_argument_group("what to draw")
    add, what = group.add_argument, group.add_mutually_exclusive_group()
    add("--n", type=data.number(int, 1, 10**6), default=1000, help="series")
    what.add_argument("--label", metavar="CLASS", help="this class alone (None: as in training)")
    what.add_argument("--unconditional", action="store_true", help="without a class")
    what.add_argument("--impute", type=stretch, metavar="START:END",
        help="instead, refill this stretch of n test series, without their labels")
    what.add_argument("--evaluate", action="store_true",
        help="novelty; of 4 or more with labels FID, inception score, CAS; TwoPatterns' shapes")
    add("--fcn-steps", type=data.number(int, 1), default=1000,
        help="training steps, of batch 64, of each classifier behind --evaluate")
    add("--dataset", help="where the data of stage 1 are now (None: where they were)")
    add("--data-dir", help="where UCR files are now (None: where they were)")
    add = parser.add_argument_group("decoding").add_argument
    add("--prior", choices=("maskgit", "uniform"), default="maskgit",
        help="uniform draws every code alike, as section 0 of the thesis does")
    add("--steps", type=data.number(int, 1, 100), default=10, help="T, of decoding")
    add("--temperature", type=data.number(float, 0, 100), default=1.0, help="of tokens")
    add("--guidance", type=data.number(float, 0, 100), default=1.0,
        help="scale; 1 is none, 0 is without the class")
    add("--rounds", type=data.number(int, 0, 100), default=10,
        help="addition: rounds that draw improbable tokens anew; 0 is without")
    add("--noise", type=data.number(float, 0, 100), default=1.0,
        help="addition: white noise on x^, in units of that of the data; 0 is without")
    return parser


def uniform(K, s_M, y=None):
    """Logits (B,N,K) of the prior of thesis section 0: every code alike."""
    return torch.zeros(*s_M.shape, K, device=s_M.device)


def generate(prior, mask_id, y, s_M, steps, temperature, guidance, rounds):
    """s_M (B,N) decoded under labels y (B) or None -> s (B,N)."""
    parts = []
    size = 128 if s_M.device.type == "cpu" else 1000  # 128 series stay in a CPU's cache
    for i in tqdm(range(0, len(s_M), size), desc="decoding", leave=False):
        canvas, labels = s_M[i : i + size], None if y is None else y[i : i + size]
        logits_fn = guided(prior, labels, guidance)
        s = decode(logits_fn, canvas, mask_id, steps, temperature)
        is_given = canvas != mask_id
        s = revise(logits_fn, s, is_given, mask_id, rounds, temperature=temperature)  # addition
        parts.append(s)
    return torch.cat(parts)


def to_series(vqvae, s, noise):
    """s (B,N) -> x^ plus noise times the data's own white noise, (B,C,L)."""
    return data.in_batches(lambda s: vqvae.detokenize(s) + noise * vqvae.noise(s), s)  # addition


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
    optimizer = torch.optim.AdamW(fcn.parameters(), 1e-3)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in tqdm(range(n_steps), desc=f"classifier on {name}", leave=False):
        rows = torch.randint(len(x), (min(64, len(x)),), device=x.device)
        optimizer.zero_grad()
        F.cross_entropy(fcn(x[rows]), y[rows]).backward()
        optimizer.step()
        annealing.step()
    return fcn.eval()


def frechet_distance(a, b):
    """FID of features a (n,D), b (m,D): |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2}).

    (Heusel et al. 2017.) With S = R^T R, tr (S_a S_b)^{1/2} is the nuclear norm of R_a R_b^T: real,
    also where features are rank-deficient. n, m >= 2; NaN where features are not finite.
    """
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.nan
    a, b = a.double(), b.double()
    R_a, R_b = (torch.linalg.qr(v - v.mean(0), mode="r").R / (len(v) - 1) ** 0.5 for v in (a, b))
    cross = torch.linalg.matrix_norm(R_a @ R_b.T, "nuc")
    between = a.mean(0) - b.mean(0)
    return (between.square().sum() + R_a.square().sum() + R_b.square().sum() - 2 * cross).item()


def inception_score(logits):
    """exp of the mean KL of p(y|x) from p(y) (Salimans et al. 2016); 1..classes."""
    log_p = logits.double().log_softmax(1)
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))
    return (log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item()


def nearest_distance(x, x_train):
    """Median distance (scalar) of the x (B,C,L) to their nearest training series."""
    x, x_train = x.flatten(1), x_train.flatten(1)
    return data.in_batches(lambda rows: torch.cdist(rows, x_train).amin(1), x).median()


def rows_in_shares_of(y_test, y, n_classes):
    """Row numbers (n) into y (n) that give its classes the shares they have in y_test.

    By systematic resampling: each row once where y has these shares already.
    """
    weight = (y_test.bincount(minlength=n_classes) / y.bincount(minlength=n_classes))[y].double()
    until = weight.cumsum(0) / weight.sum()  # NaN where all classes of y are absent in y_test
    middle = (torch.arange(len(y), dtype=torch.float64, device=y.device) + 0.5) / len(y)
    return torch.searchsorted(until, middle).clamp_max(len(y) - 1)


def scores(d, x_rec, x_train_rec, x, y, fcn_steps):
    """FID, inception score and CAS of the real data, its reconstructions and generated x, y.

    CAS learns from all x, y, in the training split's class shares; FID and inception score are of
    x resampled to the test split's. fid_real: of one half of the test split from the other; fewer
    series, so no lower bound.
    """
    train = partial(train_fcn, n_classes=len(d.classes), n_steps=fcn_steps)
    fcn = train(d.x_train, d.y_train, name="real")
    x_in_shares = x[rows_in_shares_of(d.y_test, y, len(d.classes))]
    real, rec, gen = (data.in_batches(fcn[:-1], v) for v in (d.x_test, x_rec, x_in_shares))
    halves = real[torch.randperm(len(real), device=real.device)].chunk(2)
    metrics = {}
    for name, judge, features, pair in (
        ("real", fcn, real, halves),
        ("reconstructed", train(x_train_rec, d.y_train, name="reconstructed"), rec, (real, rec)),
        ("generated", train(x, y, name="generated"), gen, (real, gen)),
    ):
        is_right = data.in_batches(judge, d.x_test).argmax(1) == d.y_test
        metrics[f"fid_{name}"] = frechet_distance(*pair)
        metrics[f"inception_{name}"] = inception_score(data.in_batches(fcn[-1], features))
        metrics[f"cas_{name}"] = is_right.float().mean().item()
    return metrics


def fit_two_patterns(x):
    """Best two flat patterns of a TwoPatterns series x (n,128), by least squares over all pairs.

    Returns (n,6): whether x is clean (at most 6 samples off by over half a level, at most 3 of them
    inside a pattern), its class 0..3, and start, first length, gap, second length.
    """
    pairs = [(start, length) for length in range(16, 33) for start in range(129 - length)]
    start, length = torch.tensor(pairs, device=x.device).T
    middle, end = start + (length + 1) // 2, start + length
    level = x.abs().topk(24, 1).values.median(1, keepdim=True).values
    total = F.pad(x.cumsum(1), (1, 0))
    fall = 2 * total[:, middle] - total[:, start] - total[:, end]  # of first half over second
    cost = length * level**2 - 2 * level * fall.abs()  # against a background of zero
    since = torch.full_like(total, math.inf).scatter_reduce(1, start.expand_as(cost), cost, "amin")
    since = since.flip(1).cummin(1).values.flip(1)  # (n,129), the least that starts no earlier
    first = (cost + since[:, end]).argmin(1, keepdim=True)
    second = cost.where(start >= end[first], math.inf).argmin(1, keepdim=True)
    best = torch.stack([first, second])  # (2,n,1)
    fall = fall.expand(2, -1, -1).gather(2, best)
    t = torch.arange(128, device=x.device)
    shape = fall.sign() * torch.where(t < middle[best], level, -level)  # (2,n,128)
    is_inside = (t >= start[best]) & (t < end[best])  # one pattern ends before two begins
    shape = shape.where(is_inside, 0).sum(0)
    is_off = ~((x - shape).abs() < 0.5 * level)  # NaN is off, too
    is_clean = (is_off.sum(1) <= 6) & ((is_off & (shape != 0)).sum(1) <= 3)
    is_up, (one, two) = fall[..., 0] < 0, best[..., 0]
    label = is_up[0] + 2 * is_up[1]
    gap = start[two] - end[one]
    return torch.stack([is_clean, label, start[one], length[one], gap, length[two]], 1)


def ks_distance(a, b):
    """Kolmogorov-Smirnov distance of two samples (n), (m): 0 alike, 1 apart."""
    values = torch.cat([a, b]).unique()
    below_a, below_b = ((v[:, None] <= values).float().mean(0) for v in (a, b))
    return (below_a - below_b).abs().max().item()


def two_patterns_scores(x_rec, y_rec, x, y):
    """Share of well-formed series, which are clean and of their class; KS distances of these."""
    metrics, parameters = {}, []
    for name, v, labels in (("reconstructed", x_rec, y_rec), ("generated", x, y)):
        is_clean, label, *fitted = data.in_batches(fit_two_patterns, v[:, 0]).T
        is_well_formed = (is_clean == 1) & (label == labels)
        metrics[f"well_formed_{name}"] = is_well_formed.float().mean().item()
        parameters.append([values[is_well_formed] for values in fitted])
    for name, a, b in zip(("start", "first_length", "gap", "second_length"), *parameters):
        metrics[f"ks_{name}"] = ks_distance(a, b) if len(a) and len(b) else 1.0
    return metrics


def evaluate(vqvae, d, x, y, noise, fcn_steps, name):
    """Novelty of x and, with labels y, `scores` and, of TwoPatterns, `two_patterns_scores`.

    Novelty: median distance of generated series to their nearest training series over that of the
    reconstructed test split: 1 as new as these, 0 copies. Reconstructions have the drawn noise too.
    """
    x_rec, x_train_rec = (to_series(vqvae, data.in_batches(vqvae.tokenize, v), noise)
                          for v in (d.x_test, d.x_train))
    novelty = nearest_distance(x, d.x_train) / nearest_distance(x_rec, d.x_train)
    metrics = {"novelty": novelty.item()}
    if novelty < 0.8:
        print("these series stay close to those of training; train with a larger --shift")
    if y is not None and min(len(x), len(d.x_test)) >= 4:  # FID needs 2 in each half
        metrics |= scores(d, x_rec, x_train_rec, x, y, fcn_steps)
    if y is not None and vqvae.L == 128 and name in ("synthetic", "TwoPatterns", "TwoPatterns.npz"):
        metrics |= two_patterns_scores(x_rec, d.y_test, x, y)
    return metrics


def plot_samples(run, x, y, classes, d):
    """The first channel of three generated series a class, one below the other, of at most 10
    classes; above them real ones of d, if it is not None."""
    columns = y.unique().tolist()[:10] if y is not None else [None]
    kinds = [("real", d.x_test, d.y_test, "0.3")] if d else []
    kinds.append(("generated", x, y, "C0"))
    below = (x[:, 0].amax() - x[:, 0].amin()).cpu() * torch.arange(3)
    figure = Figure(figsize=(max(5, 2.3 * len(columns)), 2.7 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), len(columns), sharex=True, sharey=True, squeeze=False)
    for row, (kind, v, labels, color) in zip(axes, kinds):
        for axis, c in zip(row, columns):
            rows, title = (v, "all") if c is None else (v[labels == c], f"class {classes[c]}")
            lines = rows[:3, 0].cpu().T
            axis.plot(lines - below[: lines.shape[1]], lw=1, color=color)
            axis.set(yticks=[])
            # a class may be called $
            axis.set_title(f"{kind}, {title}", fontsize=9, parse_math=False)
    figure.supxlabel("time step")
    data.write(run / "samples.png", figure.savefig)


def impute(run, vqvae, prior, d, args):
    """Refill x[start:end] of the first n test series ten times; errors against the truth."""
    start, end = args.impute
    x = d.x_test[: args.n]
    # tokens beside the stretch see into it: a straight line stands there instead of the truth
    left, right = (start - 1 if start else end), (end if end < vqvae.L else start - 1)
    line = torch.linspace(0, 1, end - start + 2, device=x.device)[1:-1]
    bridged = x.clone()
    bridged[..., start:end] = torch.lerp(x[..., left, None], x[..., right, None], line)

    # the columns of its samples: frames are centred at multiples of hop
    columns = (torch.arange(start, end, device=x.device) + vqvae.hop // 2) // vqvae.stride
    columns = columns.clamp_max(vqvae.grid[1] - 1)  # what a halving drops at the end, the last sees
    is_touched = torch.zeros(vqvae.grid, dtype=torch.bool, device=x.device)
    is_touched[:, columns] = True
    K = len(vqvae.quantizer.codebook)
    s_M = data.in_batches(vqvae.tokenize, bridged).masked_fill(is_touched.flatten(), K)
    s = generate(prior, K, None, s_M.repeat_interleave(10, 0), args.steps,
                 args.temperature, guidance=1.0, rounds=args.rounds)
    filled = to_series(vqvae, s, args.noise).unflatten(0, (len(x), -1))[..., start:end]
    x_own = (filled.double() * d.std + d.mean).cpu()  # in the data's own units
    data.write(run / "imputed.npz", partial(np.savez_compressed, x=x_own))
    truth = x[:, None, :, start:end]
    return {
        "mse_one_filling": F.mse_loss(filled, truth.expand_as(filled)).item(),
        "mse_mean_filling": F.mse_loss(filled.mean(1, keepdim=True), truth).item(),
        "mse_straight_line": F.mse_loss(bridged[:, None, :, start:end], truth).item(),
    }


if __name__ == "__main__":
    with data.one_line_errors():
        parser = flags()
        args = parser.parse_args()
        device = data.begin(args.seed, args.device)
        run = args.run or data.newest_run("stage2.pt" if args.prior == "maskgit" else "stage1.pt")
        stage1 = data.load_checkpoint(run / "stage1.pt", stage=1)
        vqvae = data.rebuild(VQVAE, stage1, device)
        classes, K, N = stage1["classes"], len(vqvae.quantizer.codebook), math.prod(vqvae.grid)
        if args.label is not None and (args.label not in classes or args.prior == "uniform"):
            parser.error(f"--label {args.label}: the classes are {', '.join(classes) or 'none'}, "
                         "and known to --prior maskgit only")
        if args.impute and (args.impute[1] > vqvae.L or args.impute == (0, vqvae.L)):
            parser.error(f"--impute takes a part of the series, which have {vqvae.L} samples")
        prior = partial(uniform, K)
        if args.prior == "maskgit":  # follow-up: a learned prior, where section 0 has a uniform one
            stage2 = data.load_checkpoint(run / "stage2.pt", stage=2)
            data.check_pair(stage1, stage2, run)
            prior = data.rebuild(MaskGIT, stage2, device)
        kept, d = stage1["flags"], None
        name = args.dataset or kept["dataset"]
        if args.evaluate or args.impute:
            d = data.load(name, args.data_dir or kept["data_dir"], device, stage1["digest"])

        if args.impute:
            data.report(run, "imputed", impute(run, vqvae, prior, d, args))
            raise SystemExit
        y = None
        if classes and args.prior == "maskgit" and not args.unconditional:
            y = torch.tensor(stage1["shares"]).multinomial(args.n, replacement=True).to(device)
            y = y if args.label is None else torch.full_like(y, classes.index(args.label))
        began = time.perf_counter()
        s = generate(prior, K, y, torch.full((args.n, N), K, device=device), args.steps,
                     args.temperature, args.guidance, args.rounds)
        x = to_series(vqvae, s, args.noise)
        x_own = x.cpu().double() * stage1["std"] + stage1["mean"]  # in the data's own units
        seconds = time.perf_counter() - began

        names = np.array(classes)[y.tolist()] if y is not None else np.full(args.n, "")
        data.write(run / "samples.npz", partial(np.savez_compressed, x=x_own, y=names, s=s.cpu()))
        plot_samples(run, x, y, classes, d)
        metrics = {"n": args.n, "drawing_seconds": seconds}
        if d:
            metrics |= evaluate(vqvae, d, x, y, args.noise, args.fcn_steps, Path(name).name)
        data.report(run, "samples", metrics)
