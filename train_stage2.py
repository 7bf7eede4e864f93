"""Stage 2: a MaskGIT prior over the tokens of a trained stage 1 (thesis 0.2).

The training series, moved by a few shifts, are tokenized once by the frozen VQ-VAE: x -> s; then,
a batch a step, s -> s_M -> logits, and their cross-entropy with s on the masked entries.

    python train_stage2.py

Leaves in the run folder: stage2.pt, stage2.jsonl and metrics.json.
Notation as in vqvae.py and maskgit.py.
"""

import math
import time

import torch
from tqdm import tqdm

import data
from maskgit import SCHEDULES, MaskGIT, guided, mask_tokens, masked_cross_entropy, nll_bound
from vqvae import VQVAE

LOG_EVERY = 100  # steps


def flags():
    """The command line, one hyperparameter a line."""
    parser = data.command_line("Train the prior over tokens (stage 2).", trains=True)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", help="where the data of stage 1 are now (None: where they were)")
    add("--data-dir", help="where UCR files are now (None: where they were)")
    add("--shift", type=data.number(float, 0, 1), default=0.25,
        help="addition: shifts of series, up to this part of a column (rounded up); 0 is without")
    add = parser.add_argument_group("optimisation").add_argument
    add("--schedule", choices=SCHEDULES, default="cosine",
        help="gamma(r) of training; decoding is by the cosine")
    add("--steps", type=data.number(int, 1), default=4000, help="length of the training")
    add("--batch-size", type=data.number(int, 1, 10**6), default=64,
        help="B, or all series where there are fewer; published 256")
    add("--lr", type=data.number(float, 0, 1), default=5e-3, help="highest rate; published 1e-3")
    return parser


def orthogonal(G, n_iterations=5):
    """G = U S V^T (n,rows,columns) with its singular values S brought near 1.

    Newton-Schulz iteration with the constants of Jordan et al. 2024: S, over its length, passes
    n_iterations times through a S + b S^3 + c S^5.
    """
    if G.shape[1] > G.shape[2]:
        return orthogonal(G.mT).mT
    X = G / torch.linalg.matrix_norm(G, keepdim=True).clamp_min(1e-7)
    for _ in range(n_iterations):
        A = X @ X.mT
        bc = torch.baddbmm(A, A, A, beta=-4.775, alpha=2.0315)  # b A + c A^2
        X = torch.baddbmm(X, bc, X, beta=3.4445)  # a X + (b A + c A^2) X
    return X


class Muon(torch.optim.Optimizer):
    """Muon: steps along the momentum, made orthogonal, for weight matrices (Jordan et al. 2024).

    A step is scaled to the size of AdamW's, so that one rate serves both (Liu et al. 2025). Unlike
    torch.optim.Muon: in fp32, as in bfloat16 many CPUs take 25 times longer; matrices of one shape
    stacked; the rate a tensor, which a CUDA graph reads anew.
    """

    def __init__(self, matrices, lr, momentum=0.95, weight_decay=0.1):
        shapes = dict.fromkeys(W.shape for W in matrices)
        groups = [{"params": [W for W in matrices if W.shape == shape]} for shape in shapes]
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            Ws, lr, momentum = group["params"], group["lr"], group["momentum"]
            gradient = torch.stack([W.grad for W in Ws])  # (n,rows,columns)
            state = self.state[Ws[0]]  # of all of them, kept under the first
            if not state:
                state["average"] = torch.zeros_like(gradient)
            state["average"].lerp_(gradient, 1 - momentum)
            steps = orthogonal(gradient.lerp(state["average"], momentum))  # Nesterov's momentum
            steps *= 0.2 * lr * max(Ws[0].shape) ** 0.5
            decay = 1 - lr * group["weight_decay"]
            for W, W_step in zip(Ws, steps):
                W.mul_(decay).sub_(W_step)


def bound(prior, s, y, n_draws=2):
    """Mean of `nll_bound` over the rows of s (n,N), given y (n) or None, and its standard error, in
    nats a series, from n_draws a row; prior in eval mode."""
    rows = torch.arange(len(s), device=s.device).repeat(n_draws)
    of_a_row = s.shape[1] * max(s.shape[1], prior.mask_id)  # N x N attention, N x K logits
    nats = torch.cat([
        nll_bound(guided(prior, None if y is None else y[i]), s[i], prior.mask_id)
        for i in rows.split(min(1000, 1 + 10**8 // of_a_row))]).view(n_draws, -1).mean(0)
    return nats.mean().item(), nats.std(correction=0).item() / len(nats) ** 0.5


if __name__ == "__main__":
    with data.one_line_errors():
        parser = flags()
        args = parser.parse_args()
        device = data.begin(args.seed, args.device)
        run = args.run or data.newest_run("stage1.pt")
        args, state = data.resume(parser, args, run / "stage2.pt", stage=2)
        stage1 = data.load_checkpoint(run / "stage1.pt", stage=1)
        if state:
            data.check_pair(stage1, state, run)
        vqvae = data.rebuild(VQVAE, stage1, device)
        kept = stage1["flags"]
        d = data.load(args.dataset or kept["dataset"], args.data_dir or kept["data_dir"], device,
                      stage1["digest"])

        n, K, N = len(d.x_train), len(vqvae.quantizer.codebook), math.prod(vqvae.grid)
        B = min(args.batch_size, n)
        if args.epochs:
            args.steps = args.epochs * max(1, round(n / B))
        # addition: the tokens of shifted series are learned, too, of at most nine shifts. Without
        # (--shift 0) the prior knows the training series by heart: the novelty of SmoothSubspace is
        # .39 without shifts in both stages, .96 with
        farthest = math.ceil(args.shift * vqvae.stride)  # up, as a column may have 2 samples only
        shifts = torch.linspace(-farthest, farthest, min(2 * farthest, 8) + 1).round().tolist()
        s_train = torch.stack([  # (shifts,n,N)
            data.in_batches(vqvae.tokenize, data.time_shift(d.x_train, int(by))) for by in shifts])

        arguments = dict(K=K, N=N, n_classes=len(d.classes))
        prior = MaskGIT(**arguments).to(device)
        rate = torch.tensor(args.lr, device=device)
        # Muon: 22 nats a series, where AdamW alone has 24 (same tokens; bfloat16, seed 0)
        matrices = [W for W in prior.layers.parameters() if W.ndim == 2]
        others = [W for W in prior.parameters() if W not in set(matrices)]
        muon = Muon(matrices, rate)
        adamw = torch.optim.AdamW(others, rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True,
                                  capturable=device.type == "cuda")
        parts = dict(model=prior, muon=muon, adamw=adamw)
        constants = dict(stage=2, arguments=arguments, digest=d.digest,
                         codebook=stage1["model"]["quantizer.codebook"])
        log = data.restore(state, parts)  # into the parts, if there is a state

        def step():
            """One step on the tokens of B distinct training series; its terms by name."""
            rows = torch.randperm(n, device=device)[:B]
            s = s_train[torch.randint(len(shifts), (B,), device=device), rows]
            y = d.y_train[rows] if d.classes else None
            is_masked = mask_tokens(s, args.schedule)
            logits = prior(s.masked_fill(is_masked, prior.mask_id), y)
            loss = masked_cross_entropy(logits, s, is_masked)
            prior.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
            muon.step()
            adamw.step()
            return {"loss": loss.detach(), "gradient_norm": norm}

        step = data.replayed(step, device, args.eager)  # on CUDA, as one graph
        done = log[-1]["step"] if log else 0
        began, sums = time.perf_counter(), {}
        bar = tqdm(range(done + 1, args.steps + 1), initial=done, total=args.steps)
        for i in bar:
            lr = args.lr * data.one_cycle((i - 1) / args.steps)
            for group in (*muon.param_groups, *adamw.param_groups):
                group["lr"].fill_(lr)
            sums = {name: sums.get(name, 0) + value for name, value in step().items()}
            is_due = i % args.save_every == 0 or i == args.steps
            if is_due or i % LOG_EVERY == 0:
                data.record(sums, log, i, run / "stage2.jsonl")
                bar.set_postfix(loss=f"{log[-1]['loss']:.3f}")
                sums = {}
            if is_due:
                data.save(run / "stage2.pt", parts, constants, log, vars(args))
        seconds = time.perf_counter() - began

        prior.eval()
        nats, error = bound(prior, data.in_batches(vqvae.tokenize, d.x_test), d.y_test)
        nats_train, _ = bound(prior, s_train[shifts.index(0)], d.y_train)
        metrics = {"test_nats_per_series": nats, "standard_error": error,
                   "train_nats_per_series": nats_train, "uniform_nats_per_series": N * math.log(K)}
        if done == 0:  # not resumed
            metrics["training_seconds"] = seconds
        data.report(run, "stage2", metrics)
