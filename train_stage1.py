"""Stage 1: a VQ-VAE whose codebook is shaped by a joint-embedding SSL loss (thesis 0.3).

x -> u -> z -> z_q -> u^, x^ is the autoencoder. Y pools z_q of x, Y' pools z' of an augmented view
x'; the SSL loss compares their projections Z and Z'.

    python train_stage1.py --ssl vbcreg

Leaves in the run folder: stage1.pt, stage1.jsonl, metrics.json and reconstructions.png.
Notation as in vqvae.py and ssl_losses.py.
"""

import math
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

import data
from ssl_losses import barlow_twins, projector, vbcreg, vicreg
from vqvae import VQVAE, perplexity

SSL_LOSSES = {"none": None, "barlow": barlow_twins, "vicreg": vicreg, "vbcreg": vbcreg}
# w_ssl, by trials: the thesis gives none, the follow-up 1 (barlow) and 0.01 (vicreg, vbcreg)
SSL_WEIGHTS = {"none": 0.0, "barlow": 10.0, "vicreg": 0.1, "vbcreg": 0.03}
VIEW_WEIGHT = 0.1  # follow-up: weight of the reconstruction of x', decoded from z' itself
LOG_EVERY = 100  # steps


def flags():
    """The command line, one hyperparameter a line."""
    parser = data.command_line("Train the VQ-VAE and its codebook (stage 1).", trains=True)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="synthetic", help="synthetic, a UCR name, or a path to an .npz")
    add("--data-dir", default="data", help="where UCR files are, or are put when downloaded")
    add("--augment", nargs="+", choices=data.AUGMENTATIONS, metavar="NAME",
        default=["window_warp", "amplitude_resize"],  # follow-up: one of its two pairs
        help=f"views are made by these in turn, of {', '.join(data.AUGMENTATIONS)}")
    add("--shift", type=data.number(float, 0, 1), default=0.25,
        help="addition: series are shifted by up to this part of a column (rounded up); 0: without")
    add = parser.add_argument_group("model").add_argument
    add("--codebook-size", type=data.number(int, 2, 4096), default=32, help="K")
    add("--columns", type=data.number(int, 2, 4096), default=8,
        help="W', columns of the latent grid: time is halved until about so many are left")
    add("--token-noise", type=data.number(float, 0, 1), default=0.2,
        help="addition: highest probability that the decoder sees a random token; 0 is without")
    add = parser.add_argument_group("SSL").add_argument
    add("--ssl", choices=SSL_LOSSES, default="vbcreg", type=lambda s: s.replace("vib", "vb"),
        help="loss on the two views; vibcreg is another name of vbcreg")
    add("--ssl-weight", type=data.number(float, 0), help=f"w_ssl (None: {SSL_WEIGHTS})")
    add("--views", type=int, choices=(1, 2), default=1,
        help="distorted ones: 1, compared with x (follow-up), or 2 (thesis)")
    add("--proj-dim", type=data.number(int, 64, 65536), default=1024,
        help="F, with vbcreg a multiple of 64; published 4096")
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=data.number(int, 1), default=1600, help="length of the training")
    add("--batch-size", type=data.number(int, 2, 10**6), default=64,
        help="B, or all series where there are fewer; published 128")
    add("--lr", type=data.number(float, 0, 1), default=5e-3,
        help="highest rate of AdamW; published 1e-3")
    return parser


def replace_tokens(model, z_q, s, highest):
    """z_q (B,D,H',W') with each of the tokens s (B,N) replaced with probability p by any code.

    p ~ U(0, highest) for each row. No reconstruction gradient reaches z where a token is replaced.
    """
    # addition: as the decoder sees some wrong tokens, neighbouring ones come to say the same. They
    # are easier to predict and a prior's errors do less harm: without (--token-noise 0) 60 nats a
    # series (with: 24), .83 well-formed (.96), a test MSE of .060 (.086; three seeds, bfloat16)
    is_kept = (torch.rand(s.shape, device=s.device)
               >= highest * torch.rand(len(s), 1, device=s.device))
    s_random = torch.randint_like(s, len(model.quantizer.codebook))
    z_random = model.quantizer.lookup(s_random, model.grid)
    return z_q.where(is_kept.view(-1, 1, *model.grid), z_random)


def stage1_loss(model, project, x, ssl, ssl_weight, augmentations, views=1, token_noise=0.0):
    """Loss of x (B,C,L); its terms by name, before VIEW_WEIGHT and w_ssl; and s (B,N).

    ssl: a loss of ssl_losses.py, or None for the autoencoder alone; for the rest see `flags`.
    """
    # x -> u -> z -> z_q -> u^, x^
    u = model.stft(x)
    z = model.encoder(u)
    z_q, s, commitment = model.quantizer(z)
    x_hat, u_hat = model.decode(replace_tokens(model, z_q, s, token_noise))  # addition
    mse_x, mse_u = F.mse_loss(x_hat, x), F.mse_loss(u_hat, u)
    terms = {"mse_x": mse_x, "mse_u": mse_u, "commitment": commitment}
    if ssl is None:
        return mse_x + mse_u + commitment, terms, s

    # batch norm normalises each view by itself; its running averages take in x and x', as the loss
    # ties z' to z_q
    encoder = model.encoder
    if views == 2:  # x is no view here: its averages stay the encoder's, the views move a copy
        averages = {name: v.clone() for name, v in encoder.named_buffers()}
        encoder = partial(torch.func.functional_call, encoder, averages)

    # x' -> u' -> z' -> u'^, x'^
    x_view = data.augment(x, augmentations)
    u_view = model.stft(x_view)
    z_view = encoder(u_view)
    x_view_hat, u_view_hat = model.decode(z_view)
    view_mse_x, view_mse_u = F.mse_loss(x_view_hat, x_view), F.mse_loss(u_view_hat, u_view)

    # z_q -> Y -> Z and z' -> Y' -> Z'
    z_q_ssl = z_q  # follow-up: one view is x itself (with two the probe is .96 instead of 1.00)
    if views == 2:  # thesis: x'', distorted too; its z'' moves the codes, but has no commitment
        z_q_ssl, _, _ = model.quantizer(encoder(model.stft(data.augment(x, augmentations))))
    # follow-up: Y pools z_q (straight-through: the loss moves z, and the codes follow) and Y' pools
    # z'. The text has both alike: with both of z, the probe is .72 and .82 (two runs), not 1.00.
    # Ours: the mean alone, where the follow-up has mean and maximum side by side
    Y, Y_view = z_q_ssl.mean((2, 3)), z_view.mean((2, 3))  # (B,D)
    Z, Z_view = project(Y), project(Y_view)  # (B,F)
    ssl_terms = ssl(Z, Z_view)

    terms |= {"view_mse_x": view_mse_x, "view_mse_u": view_mse_u} | ssl_terms
    loss = (mse_x + mse_u + commitment + VIEW_WEIGHT * (view_mse_x + view_mse_u)
            + ssl_weight * sum(ssl_terms.values()))
    return loss, terms, s


def nearest_neighbours(Y_train, y_train, Y_test, k=5):
    """Labels (m) of Y_test (m,D) by majority of the k nearest of Y_train (n,D), or of all n."""
    k = min(k, len(Y_train))
    nearest = data.in_batches(
        lambda Y: torch.cdist(Y, Y_train).topk(k, largest=False).indices, Y_test)  # (m,k)
    return F.one_hot(y_train[nearest]).sum(1).argmax(1)


def linear_probe(Y_train, y_train, Y_test, penalty=1.0):
    """Labels by a linear support vector machine, one class against the rest, on (rows,D) features.

    Minimises ||W||^2 / 2 + penalty sum relu(1 - t Y W)^2, with t +1 or -1, by L-BFGS.
    """
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


def evaluate(model, d):
    """Figures of the test split, and train_mse; both probes learn on the training split's
    average-pooled z_q, scaled to [-1,1]."""
    s, s_train = (data.in_batches(model.tokenize, x) for x in (d.x_test, d.x_train))
    x_hat, x_hat_train = (data.in_batches(model.detokenize, v) for v in (s, s_train))
    codebook = model.quantizer.codebook
    Y, Y_train = (data.in_batches(lambda rows: codebook[rows].mean(1), v) for v in (s, s_train))
    counts = torch.bincount(s.flatten(), minlength=len(codebook))
    metrics = {
        "test_mse": F.mse_loss(x_hat, d.x_test).item(),
        "train_mse": F.mse_loss(x_hat_train, d.x_train).item(),
        "perplexity": perplexity(counts).item(),
        "codebook_usage": (counts > 0).float().mean().item(),
    }
    if d.classes:
        low, high = Y_train.amin(0), Y_train.amax(0)
        Y_train, Y = (2 * (v - low) / (high - low).clamp_min(1e-8) - 1 for v in (Y_train, Y))
        for name, classify in (("linear_probe", linear_probe), ("knn", nearest_neighbours)):
            metrics[name] = (classify(Y_train, d.y_train, Y) == d.y_test).float().mean().item()
    return metrics


@torch.no_grad()
def plot_reconstructions(run, model, d):
    """The first channel of six test series, evenly spaced, one below the other."""
    x = d.x_test[torch.linspace(0, len(d.x_test) - 1, 6).long()]
    below = (x[:, 0].amax() - x[:, 0].amin()).cpu() * torch.arange(6)
    axis = Figure(figsize=(6, 8), layout="constrained").subplots()
    for v, color in ((x, "0.6"), (model.detokenize(model.tokenize(x)), "C0")):
        axis.plot(v[:, 0].cpu().T - below, color=color, lw=1.2)
    axis.set(title="x in grey, x^ in blue", xlabel="time step", yticks=[])
    data.write(run / "reconstructions.png", axis.figure.savefig)


if __name__ == "__main__":
    with data.one_line_errors():
        parser = flags()
        args = parser.parse_args()
        run = args.run or Path("runs") / f"{Path(args.dataset).stem}-{args.ssl}"
        device = data.begin(args.seed, args.device)
        args, state = data.resume(parser, args, run / "stage1.pt", stage=1)
        if args.ssl_weight is None:
            args.ssl_weight = SSL_WEIGHTS[args.ssl]
        if args.ssl == "vbcreg" and args.proj_dim % 64:
            parser.error(f"--proj-dim {args.proj_dim} is not a multiple of 64, IterNorm's group")

        d = data.load(args.dataset, args.data_dir, device, state and state["digest"])
        n, C, L = d.x_train.shape
        B = min(args.batch_size, n)
        if args.epochs:
            args.steps = args.epochs * max(1, round(n / B))

        arguments = dict(L=L, C=C, K=args.codebook_size, columns=args.columns)
        model = VQVAE(**arguments).to(device, memory_format=torch.channels_last)
        project = nn.Identity()
        if args.ssl != "none":
            D = model.quantizer.codebook.shape[1]
            project = projector(D, args.proj_dim, iternorm=args.ssl == "vbcreg").to(device)
        weights = [*model.parameters(), *project.parameters()]
        optimizer = torch.optim.AdamW(  # its rate is a tensor, which a CUDA graph reads anew
            weights, torch.tensor(args.lr, device=device), betas=(0.9, 0.95), weight_decay=0.1,
            fused=True, capturable=device.type == "cuda")
        parts = dict(model=model, project=project, optimizer=optimizer)
        shares = (d.y_train.bincount() / n).tolist() if d.classes else []
        constants = dict(stage=1, arguments=arguments, classes=d.classes, shares=shares,
                         mean=d.mean, std=d.std, digest=d.digest)
        log = data.restore(state, parts)  # into the parts, if there is a state
        farthest = math.ceil(args.shift * model.stride)  # up, as a column may have 2 samples only

        def step():
            """One step on B distinct training series; its terms by name."""
            x = d.x_train[torch.randperm(n, device=device)[:B]]
            # addition: shifted in time, else stage 1 knows small sets by heart: without (--shift 0)
            # GunPoint's novelty is .68 (with: .97), its MSE .013 (.005); the embedded set's MSE is
            # .093 (.086), .94 of its series are well-formed (.96; three seeds)
            x = data.time_shift(x, torch.randint(-farthest, farthest + 1, (B, 1), device=device))
            loss, terms, s = stage1_loss(
                model, project, x, SSL_LOSSES[args.ssl], args.ssl_weight, args.augment,
                views=args.views, token_noise=args.token_noise)
            optimizer.zero_grad()
            loss.backward()
            terms["loss"] = loss
            terms["gradient_norm"] = nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            terms["perplexity"] = perplexity(F.one_hot(s, args.codebook_size).sum((0, 1)))
            return {name: value.detach() for name, value in terms.items()}

        step = data.replayed(step, device, args.eager)  # on CUDA, as one graph
        done = log[-1]["step"] if log else 0
        began, sums = time.perf_counter(), {}
        bar = tqdm(range(done + 1, args.steps + 1), initial=done, total=args.steps)
        for i in bar:
            optimizer.param_groups[0]["lr"].fill_(args.lr * data.one_cycle((i - 1) / args.steps))
            sums = {name: sums.get(name, 0) + value for name, value in step().items()}
            is_due, is_last = i % args.save_every == 0, i == args.steps
            if i % LOG_EVERY == 0 or is_due or is_last:
                data.record(sums, log, i, run / "stage1.jsonl")
                bar.set_postfix(loss=f"{log[-1]['loss']:.3f}")
                sums = {}
            if is_due and not is_last:
                data.save(run / "stage1.pt", parts, constants, log, vars(args))
        seconds = time.perf_counter() - began

        model.eval()
        # addition, what sample.py --noise adds; measured on series moved by up to half a column,
        # as those of training may be known by heart, with their noise
        half = model.stride // 2
        shifts = torch.arange(n, device=device)[:, None] % (2 * half + 1) - half
        model.fit_noise_floor(data.time_shift(d.x_train, shifts))
        data.save(run / "stage1.pt", parts, constants, log, vars(args))
        plot_reconstructions(run, model, d)
        metrics = evaluate(model, d)
        if done == 0:  # not resumed
            metrics["training_seconds"] = seconds
        data.report(run, "stage1", metrics)
