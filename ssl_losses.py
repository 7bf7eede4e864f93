"""Joint-embedding losses without negatives, and their projector (thesis 0.3).

    off_diagonal_squares   the sum that all three decorrelation terms share
    barlow_twins           thesis 0.3.1
    vicreg                 the loss that VbCReg refines
    vbcreg                 thesis 0.3.2, eq. (1), the missing FcE term, eq. (2)
    IterNorm               whitening layer at the end of VbCReg's projector
    projector              Y (B,D) -> Z (B,F)

Each loss takes two projections Z1, Z2 (B,F) of two views of the same series and returns its
weighted terms by name; the loss is their sum. Losses and IterNorm leave autocast and compute in
fp32 (float64 stays), as squares of correlations drown in half precision. They need B >= 2.

Papers: Zbontar et al. 2021 (Barlow Twins), Bardes et al. 2022 (VICReg), Lee and Aune 2021
(VIbCReg, which the thesis calls VbCReg), Huang et al. 2019 (IterNorm).

Notation: B batch, D latent width, F projector width; Y pooled representation (B,D), Z projection
(B,F), C correlation or covariance matrix of features (F,F).
"""

from contextlib import contextmanager

import torch
import torch.nn as nn


@contextmanager
def full_precision(*tensors):
    """Autocast off, and `tensors` in fp32 (float64 is kept)."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        yield [t if t.dtype == torch.float64 else t.float() for t in tensors]


def off_diagonal_squares(U, V):
    """sum_{i != j} C_ij^2 of C = U^T V, for U, V (B,F), without the F x F matrix if B < F.

    ||U^T V||^2 = tr(V^T U U^T V) = sum((U U^T) * (V V^T)), two B x B matrices: exact, and at B 128
    and F 4096 it is 16 times less work and 512 times less memory. The squared diagonal
    C_ii = sum_b U_bi V_bi is then taken off.
    """
    if len(U) >= U.shape[1]:
        return (U.T @ V).square().fill_diagonal_(0).sum()
    # NOTE(differs): public code forms the F x F matrix
    return ((U @ U.T) * (V @ V.T)).sum() - (U * V).sum(0).square().sum()


def barlow_twins(Z1, Z2, lambd=0.005):
    """Barlow Twins (thesis 0.3.1): (sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2) / F.

    C = Z1^T Z2 / B with every feature standardised over the batch, by the biased deviation, so
    that identical views give C_ii = 1.
    """
    with full_precision(Z1, Z2) as (Z1, Z2):
        B, F = Z1.shape
        Z1, Z2 = ((Z - Z.mean(0)) / Z.std(0, correction=0).clamp_min(1e-5) for Z in (Z1, Z2))
        C_diagonal = (Z1 * Z2).mean(0)
        # NOTE(differs): the paper does not divide by F, the follow-up does
        return {
            "invariance": (1 - C_diagonal).square().sum() / F,
            "redundancy": lambd * off_diagonal_squares(Z1, Z2) / B**2 / F,
        }


def similarity(Z1, Z2):
    """Mean squared distance of the two views, eq. (1): (B,F), (B,F) -> scalar."""
    # NOTE(differs): eq. (1) sums over the F features; their mean keeps its weight free of F
    return (Z1 - Z2).square().mean()


def expressiveness(Z, gamma=1.0, eps=1e-4):
    """FcE or variance term: mean_f relu(gamma - sqrt(Var(Z_f) + eps)), Z (B,F).

    Holds each feature's deviation over the batch above gamma, so that the views cannot agree by
    all being the same. Var is the 1/(B-1) estimate.
    """
    # NOTE(differs): the thesis leaves the equation out; this is VICReg's, and the callers sum it
    # over both branches as its paper does, where its code takes the mean
    return torch.relu(gamma - (Z.var(0) + eps).sqrt()).mean()


def vicreg(Z1, Z2, sim_weight=25.0, var_weight=25.0, cov_weight=1.0):
    """VICReg, weighted as in its paper. Covariance: sum_{i != j} Cov_ij^2 / F of each view."""
    with full_precision(Z1, Z2) as (Z1, Z2):
        B, F = Z1.shape
        centred = [(Z - Z.mean(0)) / (B - 1) ** 0.5 for Z in (Z1, Z2)]
        return {
            "similarity": sim_weight * similarity(Z1, Z2),
            "variance": var_weight * (expressiveness(Z1) + expressiveness(Z2)),
            "covariance": cov_weight * sum(off_diagonal_squares(U, U) / F for U in centred),
        }


def decorrelation(Z):
    """FD: sum_{i != j} C_ij^2 / F^2 (VIbCReg's) of C(Z), eq. (2). Z (B,F) -> [0,1).

    C = U^T U, where U is Z less its batch mean with every column scaled to length 1, so that C is
    the correlation matrix and no feature's scale matters.
    """
    # NOTE(differs): the text lacks the 1/B in Zbar; its norm is of the whole matrix as printed, and
    # 1/(B-1) belongs to a covariance, not to columns that are normalised already
    U = nn.functional.normalize(Z - Z.mean(0), dim=0)
    return off_diagonal_squares(U, U) / Z.shape[1] ** 2


def vbcreg(Z1, Z2, sim_weight=25.0, var_weight=25.0, cov_weight=100.0):
    """VbCReg (thesis 0.3.2), weighted as in the follow-up (NC-VQVAE, arXiv 2408.16613)."""
    with full_precision(Z1, Z2) as (Z1, Z2):
        return {
            "similarity": sim_weight * similarity(Z1, Z2),
            "expressiveness": var_weight * (expressiveness(Z1) + expressiveness(Z2)),
            "decorrelation": cov_weight * (decorrelation(Z1) + decorrelation(Z2)),
        }


class IterNorm(nn.Module):
    """Whitening in groups of features by Newton's iteration (Huang et al. 2019), Z (B,F) -> (B,F).

    Within each group, P_0 = I and P_k = (3 P_{k-1} - P_{k-1}^3 S) / 2 tends to S^{-1/2}, where S is
    the group's covariance (plus eps I) over its trace; P_T / sqrt(trace) whitens. Five steps leave
    the smallest directions partly whitened, which keeps B < group_size finite. Eval mode uses
    running averages of mean and whitening matrix, with `momentum` the weight of the new value.
    ValueError if group_size does not divide F. Below, G groups of d = group_size features.
    """

    def __init__(self, F, group_size=64, T=5, eps=1e-5, momentum=0.1):
        super().__init__()
        if F % group_size:
            raise ValueError(f"{F} features do not divide into IterNorm groups of {group_size}")
        self.T, self.eps, self.momentum = T, eps, momentum
        G = F // group_size
        self.weight = nn.Parameter(torch.ones(F))
        self.bias = nn.Parameter(torch.zeros(F))
        self.register_buffer("running_mean", torch.zeros(G, group_size, 1))
        self.register_buffer("running_whitening", torch.eye(group_size).repeat(G, 1, 1))

    def whitening(self, centred):
        """Inverse square root of each group's covariance: (G,d,B) -> (G,d,d)."""
        _, d, B = centred.shape
        P = identity = torch.eye(d, dtype=centred.dtype, device=centred.device)
        covariance = centred @ centred.mT / B + self.eps * identity
        trace = covariance.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
        S = covariance / trace
        for _ in range(self.T):
            P = 1.5 * P - 0.5 * (P @ P @ P) @ S
        return P / trace.sqrt()

    def forward(self, Z):
        with full_precision(Z) as (Z,):
            groups = Z.T.reshape(*self.running_mean.shape[:2], len(Z))  # (G,d,B)
            if self.training:
                mean = groups.mean(-1, keepdim=True)
                P = self.whitening(groups - mean)
                with torch.no_grad():
                    self.running_mean.lerp_(mean, self.momentum)
                    self.running_whitening.lerp_(P, self.momentum)
            else:
                mean, P = self.running_mean, self.running_whitening
            return (P @ (groups - mean)).reshape(-1, len(Z)).T * self.weight + self.bias


def projector(D, F=1024, iternorm=False):
    """Linear layers D -> F -> F -> F, batch norm and ReLU between; VbCReg ends in IterNorm."""
    layers = [nn.Linear(D, F, bias=False), nn.BatchNorm1d(F), nn.ReLU()]
    layers += [nn.Linear(F, F, bias=False), nn.BatchNorm1d(F), nn.ReLU(), nn.Linear(F, F)]
    return nn.Sequential(*layers, *([IterNorm(F)] if iternorm else []))
