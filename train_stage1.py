"""Stage 1: a VQ-VAE whose code book is shaped by a joint-embedding SSL loss (thesis 0.3).

x -> u -> z -> z_q -> u^, x^, and beside it two views -> Y1, Y2 -> Z1, Z2 -> SSL loss.

    python train_stage1.py --ssl vbcreg

Leaves in the run folder: stage1.pt, stage1.jsonl (a line an epoch), metrics.json and pictures.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

import data
from ssl_losses import barlow_twins, projector, vbcreg, vicreg
from vqvae import VQVAE, perplexity

SSL_LOSSES = {"barlow": barlow_twins, "vicreg": vicreg, "vbcreg": vbcreg}
SSL_WEIGHT = {"none": 0.0, "barlow": 1.0, "vicreg": 0.1, "vbcreg": 0.03}
RECONSTRUCT_VIEW = 0.1  # weight of the augmented view's reconstruction


def stage1_losses(model, project, x, args):
    """All weighted loss terms of a batch x (B,C,L) by name, and its tokens s."""
    views = []
    if args.ssl != "none":
        views = [data.augment(x, args.augment) for _ in range(args.views)]
    z = model.encode(torch.cat([x, *views]))
    z, z_view = (z[:-len(x)], z[-len(x):]) if views else (z, z[:0])
    z_q, s, commitment = model.quantiser(z)
    x_hat, u_hat = model.decode(torch.cat([z_q[: len(x)], z_view]))

    B = len(x)
    terms = {"mse_x": F.mse_loss(x_hat[:B], x), "mse_u": F.mse_loss(u_hat[:B], model.stft(x)),
             "commitment": commitment}
    if views:
        terms["view_x"] = RECONSTRUCT_VIEW * F.mse_loss(x_hat[B:], views[-1])
        terms["view_u"] = RECONSTRUCT_VIEW * F.mse_loss(u_hat[B:], model.stft(views[-1]))
        Y1, Y2 = z_q[-B:].mean((2, 3)), z_view.mean((2, 3))
        for name, term in SSL_LOSSES[args.ssl](project(Y1), project(Y2)).items():
            terms[f"{args.ssl}_{name}"] = args.ssl_weight * term
    return terms, s[:B]
