"""Stage 1: a VQ-VAE whose code book is shaped by a joint-embedding SSL loss (thesis 0.3).

x -> u -> z -> z_q -> u^, x^ is the autoencoder. Y1 pools z_q of x itself (of the first view, where
there are two), Y2 pools z of the last view; the SSL loss compares their projections Z1, Z2.

    python train_stage1.py --ssl vbcreg

Leaves in the run folder: stage1.pt, stage1.jsonl (a line an epoch), metrics.json and pictures.
Notation as in vqvae.py and ssl_losses.py.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib import style
from matplotlib.figure import Figure

import data
from ssl_losses import barlow_twins, projector, vbcreg, vicreg
from vqvae import VQVAE, perplexity

style.use(["tableau-colorblind10", {"text.parse_math": False}])  # a class may be called $

SSL_LOSSES = {"barlow": barlow_twins, "vicreg": vicreg, "vbcreg": vbcreg}
# NOTE(differs): the follow-up has 1 for barlow, 0.01 for vicreg and vbcreg
SSL_WEIGHTS = {"none": 0.0, "barlow": 10.0, "vicreg": 0.1, "vbcreg": 0.03}
VIEW_WEIGHT = 0.1  # of the augmented view's reconstruction
DEVIATION_WEIGHT = 0.1  # of deviation_loss


def flags():
    """The command line, one hyperparameter a line."""
    parser = argparse.ArgumentParser(description="Train the VQ-VAE and its code book (stage 1).")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="synthetic", help="synthetic, a UCR name, or a path to an .npz")
    add("--data-dir", default="data", help="where UCR files are, or are put when downloaded")
    add("--augment", nargs="+", choices=data.AUGMENTATIONS,
        default=["window_warp", "amplitude_resize"],
        help="views are made by these in turn (default window_warp amplitude_resize)")
    add("--shift", type=data.number(float, 0, 1), default=0.25,
        help="in training shift x by up to this many columns (default 0.25; published 0)")
    add = parser.add_argument_group("model").add_argument
    add("--codebook-size", type=data.number(int, 2, 4096), default=32, help="K (default 32)")
    add("--token-noise", type=data.number(float, 0, 1), default=0.2,
        help="highest probability that the decoder sees a random token (default 0.2; published 0)")
    add = parser.add_argument_group("SSL").add_argument
    add("--ssl", choices=SSL_WEIGHTS, default="vbcreg", type=lambda s: s.replace("vib", "vb"),
        help="loss on the two views; vibcreg is another name of vbcreg (default vbcreg)")
    add("--ssl-weight", type=data.number(float, 0), help=f"w_ssl (default by loss: {SSL_WEIGHTS})")
    add("--views", type=int, choices=(1, 2), default=1,
        help="1 compares x with a view of it, 2 two views with each other (default 1)")
    # NOTE(differs): the follow-up has 4096
    add("--proj-dim", type=data.number(int, 64, 65536), default=1024,
        help="F, with vbcreg a multiple of 64 (default 1024; published 4096)")
    add = parser.add_argument_group("optimisation").add_argument
    # NOTE(differs): published 1000
    add("--epochs", type=data.number(int, 1), default=120, help="default 120; published 1000")
    add("--batch-size", type=data.number(int, 2, 10**6), default=64,
        help="B, at most; batch sizes of an epoch differ by one (default 64; published 128)")
    add("--lr", type=data.number(float, 0, 1), default=5e-3,
        help="highest of AdamW's one-cycle schedule (default 5e-3; published 1e-3)")
    return data.run_flags(parser, trains=True)


def replace_tokens(model, z_q, s, most):
    """z_q (B,D,H',W') with each of the tokens s (B,N) replaced with probability p by any code.

    p ~ U(0, most) for each row; where a token is replaced, no reconstruction gradient reaches z.
    The decoder learns to get along with some wrong tokens, so that neighbouring tokens come to say
    the same things: they are easier to predict, and series from a prior that errs stay well-formed.
    """
    # NOTE(differs): neither the thesis nor the follow-up; --token-noise 0 is theirs
    draw = torch.rand(s.shape, device=s.device)
    is_replaced = draw < most * torch.rand(len(s), 1, device=s.device)
    s_random = torch.randint_like(s, len(model.quantiser.codes))
    z_random = model.quantiser.lookup(s_random, z_q.shape[-2:])
    return z_random.where(is_replaced.view(-1, 1, *z_q.shape[-2:]), z_q)


def deviation_loss(error, log_deviation):
    """error = |x - x^| and log_deviation, log d, (B,C,L) -> scalar.

    Laplace negative log-likelihood with scale sqrt(2/pi) d, less a constant: lowest at
    d = sqrt(pi/2) E(error). For Gaussian errors that is their standard deviation. Where errors are
    rare and large, as at edges, d stays well below it, so that less noise is drawn there.
    """
    return (log_deviation + math.sqrt(math.pi / 2) * error / log_deviation.exp()).mean()


def stage1_losses(model, project, x, args):
    """Weighted loss terms by name of a batch x (B,C,L), whose sum is the loss, and s (B,N)."""
    # NOTE(differs): neither the thesis nor the follow-up shifts x; --shift 0 is theirs
    most, B = int(args.shift * model.stride), len(x)
    x = data.time_shift(x, torch.randint(-most, most + 1, (B, 1), device=x.device))
    n_views = 0 if args.ssl == "none" else args.views
    # NOTE(differs): the thesis distorts both views, the follow-up one, and its other is x itself
    views = [data.augment(x, args.augment) for _ in range(n_views)]
    z = model.encode(torch.cat([x, *views]))  # (B (1 + n_views),D,H',W')
    n_quantised = B * max(1, n_views)  # x, and the first of two views; the last is not quantised
    z, z_view = z[:n_quantised], z[n_quantised:]
    z_q, s, commitment = model.quantiser(z)
    n_clean = B // 4 + 1  # rows whose tokens stay: the deviation is from x^ of these
    z_replaced = replace_tokens(model, z_q[n_clean:B], s[n_clean:B], args.token_noise)
    x_hat, u_hat, log_deviation = model.decode(torch.cat([z_q[:n_clean], z_replaced, z_view]))
    terms = {"mse_x": F.mse_loss(x_hat[:B], x), "mse_u": F.mse_loss(u_hat[:B], model.stft(x)),
             "commitment": commitment}
    # x^ is held fixed; the gradient by log_deviation passes on to decoder and encoder
    error = (x[:n_clean] - x_hat[:n_clean]).detach().abs()
    terms["deviation"] = DEVIATION_WEIGHT * deviation_loss(error, log_deviation[:n_clean])
    if views:
        terms["view_mse_x"] = VIEW_WEIGHT * F.mse_loss(x_hat[B:], views[-1])
        terms["view_mse_u"] = VIEW_WEIGHT * F.mse_loss(u_hat[B:], model.stft(views[-1]))
        # NOTE(differs): average alone, the follow-up has the maximum beside it
        # NOTE(differs): Y and Y' alike in the text; here, as in the follow-up, Y1 from the codes:
        # its gradient passes to z unchanged (straight-through), and the codes follow z
        Y1, Y2 = z_q[-B:].mean((2, 3)), z_view.mean((2, 3))  # of x, or of the first of two views
        # two calls: the projector's batch norm sees one branch at a time
        for name, term in SSL_LOSSES[args.ssl](project(Y1), project(Y2)).items():
            terms[name] = args.ssl_weight * term
    return terms, s[:B]


def represent(model, x):
    """x (B,C,L) -> x^ (B,C,L), average-pooled z_q (B,D), tokens s (B,N). Call in eval mode."""
    s = data.in_batches(model.tokenise, x)
    Y = data.in_batches(lambda s: model.quantiser.codes[s].mean(1), s)
    return data.in_batches(model.detokenise, s), Y, s


def nearest_neighbours(Y_train, y_train, Y_test, k=5):
    """Labels by majority of the k nearest training rows (fewer if there are fewer)."""
    def vote(Y):
        nearest = torch.cdist(Y, Y_train).topk(min(k, len(Y_train)), largest=False).indices
        return F.one_hot(y_train[nearest]).sum(1).argmax(1)

    return data.in_batches(vote, Y_test)


def linear_probe(Y_train, y_train, Y_test, penalty=1.0):
    """Labels by a linear support vector machine, one class against the rest, on (rows,D) features.

    Minimises ||W||^2 / 2 + penalty sum relu(1 - t f(Y))^2 by L-BFGS to convergence.
    """
    # on the features of four trained code books within 0.001 of scikit-learn's LinearSVC(C=1), and
    # within 0.026 (0.006 where it is above 0.9) of its SVC(kernel="linear", C=1), one against one
    Y_train, Y_test = (F.pad(Y, (0, 1), value=1.0) for Y in (Y_train, Y_test))  # bias column
    t = 2.0 * F.one_hot(y_train) - 1  # (rows,classes), +1 or -1
    W = torch.zeros(Y_train.shape[1], t.shape[1], device=t.device, requires_grad=True)
    solver = torch.optim.LBFGS([W], max_iter=1000, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        loss = W.square().sum() / 2 + penalty * torch.relu(1 - t * (Y_train @ W)).square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return (Y_test @ W).argmax(1)


def evaluate(model, d, K):
    """Figures of the test split (train_mse: of training), and the training split's code counts (K).

    Both probes learn on the training split's average-pooled z_q, scaled to [-1,1] by it.
    """
    x_hat, Y, s = represent(model, d.x_test)
    x_hat_train, Y_train, s_train = represent(model, d.x_train)
    counts, counts_train = (torch.bincount(v.flatten(), minlength=K).cpu() for v in (s, s_train))
    metrics = {
        "test_mse": F.mse_loss(x_hat, d.x_test).item(),
        "train_mse": F.mse_loss(x_hat_train, d.x_train).item(),
        "perplexity": perplexity(counts).item(),
        "codes_used": (counts > 0).float().mean().item(),
    }
    if d.classes:
        low, high = Y_train.amin(0), Y_train.amax(0)
        Y_train, Y = (2 * (v - low) / (high - low).clamp_min(1e-8) - 1 for v in (Y_train, Y))
        for name, classify in (("linear_probe", linear_probe), ("knn", nearest_neighbours)):
            metrics[name] = (classify(Y_train, d.y_train, Y) == d.y_test).float().mean().item()
    return metrics, counts_train


def draw_reconstructions(run, model, d):
    """A row a class, at most 10: x in grey behind x^; training split left, test split right."""
    rows = min(10, max(1, len(d.classes)))
    figure = Figure(figsize=(9, 1.3 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, 2, sharex=True, squeeze=False)
    splits = ("train", d.x_train, d.y_train), ("test", d.x_test, d.y_test)
    for column, (split, x, y) in zip(axes.T, splits):
        column[0].set_title(split)
        column[-1].set_xlabel("time step")
        for c, axis in enumerate(column):
            one = x[y == c][:1] if d.classes else x[:1]
            if len(one):  # the test split may lack a class
                axis.plot(one[0, 0].cpu(), color="0.6", lw=1, label="x")
                axis.plot(represent(model, one)[0][0, 0].cpu(), color="C0", lw=1.2, label="x^")
            axis.set_ylabel(f"class {d.classes[c]}" if d.classes else "")
    axes[0, 0].legend(loc="upper right", fontsize=8)
    data.write(run / "reconstructions.png", figure.savefig)


def draw_curves(run, log, counts):
    """Loss terms and use of the code book over the epochs; how often each code is chosen now."""
    left, middle, right = Figure(figsize=(12, 3.4), layout="constrained").subplots(1, 3)
    curves = {name: [record[name] for record in log] for name in log[0]}
    epoch = curves.pop("epoch")
    del curves["deviation"]  # a log axis has no place for its negative values
    middle.plot(epoch, curves.pop("perplexity"), label="perplexity")
    middle.plot(epoch, [v * len(counts) for v in curves.pop("codes_used")], label="codes in use")
    middle.set(xlabel="epoch", ylabel="codes", ylim=(0, None))
    for i, (name, values) in enumerate(curves.items()):
        left.plot(epoch, values, label=name, ls=("-", "--", ":")[i % 3])
    left.set(yscale="log", xlabel="epoch", ylabel="loss term, weighted; gradient norm")
    left.yaxis.set_major_formatter("{x:g}")  # its default would need parse_math
    left.yaxis.set_minor_formatter("")
    shares = (counts / counts.sum()).sort(descending=True).values.numpy()
    right.bar(range(len(counts)), shares, width=0.9)
    right.axhline(1 / len(counts), color="0.5", ls=":", label="all alike")
    right.set(xlabel="code, by rank", ylabel="share of the training tokens")
    for axis in (left, middle, right):
        axis.legend(fontsize=7, ncols=2)
    data.write(run / "stage1.png", left.figure.savefig)


def draw_views(run, x, names):
    """One series x (1,C,L) and two draws of every augmentation in use, and of their sequence."""
    rows = [[name] for name in names] + ([names] if len(names) > 1 else [])
    figure = Figure(figsize=(9, 1.3 * len(rows) + 0.6), layout="constrained")
    for axis, row in zip(figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0], rows):
        axis.plot(x[0, 0].cpu(), color="0.6", lw=1, label="x")
        for i in (1, 2):
            axis.plot(data.augment(x, row)[0, 0].cpu(), color=f"C{i - 1}", lw=1, label=f"view {i}")
        axis.set_title(", then ".join(row), fontsize=9)
        axis.set_ylabel("x, scaled")
    axis.set_xlabel("time step")
    axis.legend(loc="upper right", fontsize=8, ncols=3)
    data.write(run / "views.png", figure.savefig)


def draw_classes(run, model, d, title):
    """Pooled z_q of the test split on its first two principal components, a colour a class."""
    rows = torch.randperm(len(d.x_test), device=d.x_test.device)[:1000]
    Y, y = represent(model, d.x_test[rows])[1].cpu(), d.y_test[rows].cpu()
    plane = (Y - Y.mean(0)) @ torch.pca_lowrank(Y, 2)[2]
    axis = Figure(figsize=(4.5, 4), layout="constrained").subplots()
    for c, name in enumerate(d.classes):
        axis.scatter(*plane[y == c].T.numpy(), s=8, label=f"class {name}", marker="osD^vP*X"[c % 8])
    axis.set(xlabel="first component", ylabel="second component", title=title)
    if len(d.classes) <= 10:
        axis.legend(fontsize=7)
    data.write(run / "classes.png", axis.figure.savefig)


if __name__ == "__main__":
    parser = flags()
    args = parser.parse_args()
    run = args.run or Path("runs") / f"{Path(args.dataset).stem}-{args.ssl}"
    device = data.begin(args.seed, args.device)
    args, state = data.resume(parser, args, run / "stage1.pt", stage=1)
    if args.ssl == "none" and (args.ssl_weight or args.views == 2):
        parser.error("--ssl none has neither --ssl-weight nor --views")
    if args.ssl == "vbcreg" and args.proj_dim % 64:
        parser.error(f"--proj-dim {args.proj_dim} is not a multiple of 64, IterNorm's group")
    if args.ssl_weight is None:
        args.ssl_weight = SSL_WEIGHTS[args.ssl]

    d = data.load_again(state, device) if state else data.load(args.dataset, args.data_dir, device)
    n, C, L = d.x_train.shape
    n_steps = min(math.ceil(n / args.batch_size), n // 2)  # an epoch; BatchNorm needs 2 rows

    arguments = dict(L=L, C=C, K=args.codebook_size)
    model = VQVAE(**arguments).to(device, memory_format=torch.channels_last)
    K, D = model.quantiser.codes.shape
    project = nn.Identity()
    if args.ssl != "none":
        project = projector(D, args.proj_dim, iternorm=args.ssl == "vbcreg").to(device)
    weights = [*model.parameters(), *project.parameters()]
    # NOTE(differs): betas, weight decay, one cycle, clipping and batch, by the README's ablation
    optimiser = torch.optim.AdamW(weights, args.lr, (0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = data.one_cycle(optimiser, args.epochs * n_steps)
    parts = dict(model=model, project=project, optimiser=optimiser, schedule=schedule)
    constants = dict(stage=1, arguments=arguments, shape=[len(d.classes), n, C, L])
    log = data.restore(state, parts)

    began, first_epoch = time.perf_counter(), len(log)
    for epoch in data.epochs(run, parts, vars(args), log, constants):
        losses, counts = [], torch.zeros(K, device=device)
        for rows in torch.randperm(n, device=device).tensor_split(n_steps):
            terms, s = stage1_losses(model, project, d.x_train[rows], args)
            optimiser.zero_grad()
            sum(terms.values()).backward()
            terms["gradient_norm"] = nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            schedule.step()
            losses.append(torch.stack(list(terms.values())).detach())
            counts.index_add_(0, s.flatten(), torch.ones(s.numel(), device=device))
        log.append(data.finite_means(losses, list(terms), epoch, run) | {
            "perplexity": perplexity(counts).item(),
            "codes_used": (counts > 0).float().mean().item()})
    cost = data.cost(began, n_steps * (args.epochs - first_epoch), n / n_steps, device)

    model.eval()
    metrics, counts = evaluate(model, d, K)
    data.report(run, "stage1", metrics | cost)
    draw_curves(run, log, counts)
    draw_reconstructions(run, model, d)
    draw_views(run, d.x_train[:1], args.augment)
    if d.classes and len(d.x_test) > 1:
        draw_classes(run, model, d, f"{Path(args.dataset).stem}, --ssl {args.ssl}")
