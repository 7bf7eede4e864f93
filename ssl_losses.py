"""Joint-embedding losses without negatives, and their projector (thesis 0.3).

    off_diagonal_squares   the sum that all three decorrelation terms share
    barlow_twins           thesis 0.3.1
    vicreg                 the loss that VbCReg refines, of `similarity` and `expressiveness`
    vbcreg                 thesis 0.3.2: eq. (1), the missing FcE, and `decorrelation`, eq. (2)
    IterNorm               whitening layer at the end of VbCReg's projector
    projector              Y (B,D) -> Z (B,F)

Each loss takes two projections Z1, Z2 (B,F) of two views of the same series and returns its
weighted terms by name; the loss is their sum. Losses and IterNorm leave autocast and compute in
fp32 (float64 stays), as small squares are lost in half precision. They need B >= 2.

Papers: Zbontar et al. 2021 (Barlow Twins), Bardes et al. 2022 (VICReg), Lee and Aune 2021
(VIbCReg, which the thesis calls VbCReg), Huang et al. 2019 (IterNorm).

Notation: B batch, D latent width, F projector width; Y pooled representation (B,D), Z projection
(B,F), C correlation or covariance matrix of features (F,F).
"""

from contextlib import contextmanager

import torch
import torch.nn as nn


@contextmanager
def full_precision(*inputs):
    """A block without autocast; yields the inputs, those in half precision as fp32."""
    device = inputs[0].device.type.replace("meta", "cpu")  # the meta device has no autocast
    with torch.autocast(device, enabled=False):
        yield [v.float() if v.dtype in (torch.float16, torch.bfloat16) else v for v in inputs]


def off_diagonal_squares(U, V):
    """sum_{i != j} C_ij^2 of C = U^T V (F,F), for U, V (B,F).

    Where B < F it is had from two B x B matrices, without C, as ||U^T V||^2 = tr(V^T U U^T V) =
    sum((U U^T) * (V V^T)), less the squares of the diagonal C_ii = sum_b U_bi V_bi: exact, and at
    B 128, F 4096 16 times less work and 512 times less memory.
    """
    if len(U) >= U.shape[1]:
        return (U.T @ V).square().fill_diagonal_(0).sum()
    return ((U @ U.T) * (V @ V.T)).sum() - (U * V).sum(0).square().sum()


def barlow_twins(Z1, Z2):
    """Barlow Twins (thesis 0.3.1): (sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2) / F.

    C = Z1^T Z2 / B with every feature standardised over the batch, by the biased deviation, so
    that identical views give C_ii = 1; lambda is 0.005.
    """
    B, F = Z1.shape
    with full_precision(Z1, Z2) as (Z1, Z2):
        Z1, Z2 = ((Z - Z.mean(0)) / Z.std(0, correction=0).clamp_min(1e-5) for Z in (Z1, Z2))
        C_ii = (Z1 * Z2).mean(0)
        # follow-up: divided by F, which the paper does not do
        return {
            "invariance": (1 - C_ii).square().sum() / F,
            "redundancy": 0.005 * off_diagonal_squares(Z1, Z2) / B**2 / F,
        }


def similarity(Z1, Z2):
    """s(Z1,Z2): mean squared difference of entries, eq. (1) / F: (B,F), (B,F) -> scalar."""
    # follow-up: eq. (1) sums over the F features; their mean keeps its weight free of F
    return (Z1 - Z2).square().mean()


def expressiveness(Z, gamma=1.0, eps=1e-4):
    """FcE or variance term: v(Z) = mean_f relu(gamma - sqrt(Var(Z_f) + eps)), Z (B,F).

    Keeps each feature's deviation over the batch at gamma or more, lest all series be mapped to
    one point. Var is the 1/(B-1) estimate.
    """
    # fix: the thesis leaves the equation out; this is VICReg's, and the losses below sum it over
    # both branches as its paper does, where its code takes the mean
    return torch.relu(gamma - (Z.var(0) + eps).sqrt()).mean()


def vicreg(Z1, Z2):
    """VICReg: 25 s(Z1,Z2) + 25 (v(Z1) + v(Z2)) + c(Z1) + c(Z2), the weights of its paper.

    c(Z) = sum_{i != j} C_ij^2 / F with the covariance C = (Z - Zbar)^T (Z - Zbar) / (B - 1).
    """
    B, F = Z1.shape
    with full_precision(Z1, Z2) as (Z1, Z2):
        centred = [(Z - Z.mean(0)) / (B - 1) ** 0.5 for Z in (Z1, Z2)]
        return {
            "similarity": 25 * similarity(Z1, Z2),
            "variance": 25 * (expressiveness(Z1) + expressiveness(Z2)),
            "covariance": sum(off_diagonal_squares(U, U) / F for U in centred),
        }


def decorrelation(Z):
    """FD: sum_{i != j} C_ij^2 / F^2 of C(Z), eq. (2) mended: Z (B,F) -> scalar in [0,1).

    C = U^T U, where U is Z less its batch mean with every column scaled to length 1, so that C is
    the correlation matrix and no feature's scale matters.
    """
    # fix: the text's Zbar lacks 1/B, its norm is that of the whole matrix, and its 1/(B-1) belongs
    # to a covariance, not to columns that are normalised already
    U = nn.functional.normalize(Z - Z.mean(0), dim=0)
    return off_diagonal_squares(U, U) / Z.shape[1] ** 2


def vbcreg(Z1, Z2):
    """VbCReg (thesis 0.3.2): 25 s(Z1,Z2) + 25 (v(Z1) + v(Z2)) + 100 (FD(Z1) + FD(Z2))."""
    with full_precision(Z1, Z2) as (Z1, Z2):  # follow-up: the weights 25, 25, 100
        return {
            "similarity": 25 * similarity(Z1, Z2),
            "expressiveness": 25 * (expressiveness(Z1) + expressiveness(Z2)),
            "decorrelation": 100 * (decorrelation(Z1) + decorrelation(Z2)),
        }


class IterNorm(nn.Module):
    """Whitening in groups of features by Newton's iteration (Huang et al. 2019), Z (B,F) -> (B,F).

    Within each group, P_0 = I and P_k = (3 P_{k-1} - P_{k-1}^3 S) / 2 tends to S^{-1/2}, where S is
    the group's covariance (plus eps I) over its trace; P_T / sqrt(trace) whitens. Five steps leave
    the smallest directions partly whitened, which keeps B < group_size finite. Eval mode uses
    running averages of mean and whitening. Below, G = F/d groups of d = group_size features.
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
        identity = torch.eye(d, dtype=centred.dtype, device=centred.device)
        covariance = centred @ centred.mT / B + self.eps * identity
        trace = covariance.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
        S = covariance / trace
        P = 1.5 * identity - 0.5 * S  # P_1
        for _ in range(self.T - 1):
            P = torch.baddbmm(P, P @ P @ P, S, beta=1.5, alpha=-0.5)  # (3 P - P^3 S) / 2
        return P / trace.sqrt()

    def forward(self, Z):
        with full_precision(Z) as (Z,):
            groups = Z.T.reshape(*self.running_mean.shape[:2], len(Z))  # (G,d,B)
            mean, P = self.running_mean, self.running_whitening
            if self.training:
                mean = groups.mean(-1, keepdim=True)
                P = self.whitening(groups - mean)
                self.running_mean.lerp_(mean.detach(), self.momentum)
                self.running_whitening.lerp_(P.detach(), self.momentum)
            return (P @ (groups - mean)).reshape(-1, len(Z)).T * self.weight + self.bias


def projector(D, F=1024, iternorm=False):
    """Linear D -> F -> F -> F, batch norm, ReLU between; iternorm (VbCReg): 64 divides F."""
    layers = [nn.Linear(D, F, bias=False), nn.BatchNorm1d(F), nn.ReLU()]
    layers += [nn.Linear(F, F, bias=False), nn.BatchNorm1d(F), nn.ReLU(), nn.Linear(F, F)]
    return nn.Sequential(*layers, *([IterNorm(F)] if iternorm else []))
