"""MaskGIT: a prior over token sequences, learned by filling in masked tokens (thesis 0.2).

    SCHEDULES, mask_tokens    how much is masked, and where (thesis 0.2.1, 0.2.3)
    masked_cross_entropy      the training loss
    MaskGIT                   the bidirectional transformer
    guided                    a prior's logits_fn, s_M (B,N) -> logits (B,N,K), under labels
    decode                    iterative decoding of masked entries (thesis 0.2.2)
    revise                    an addition to it: rounds that draw improbable entries anew
    nll_bound                 how well a prior knows given sequences

Papers: Chang et al. 2022 (MaskGIT), Ho and Salimans 2022 (classifier-free guidance), Lezama et al.
2022 (Token-Critic) and Lee et al. 2023 (ESS), of whose kind `revise` is, Uria et al. 2014 (the
any-order bound).

Notation: B batch, N tokens, K codes; s tokens (B,N) in 0..K-1, s_M the same with masked entries set
to [MASK], whose id is K; y labels (B) in 0..n_classes-1. Masks are True where their name says.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# gamma(r): share of the entries that is masked, from gamma(0) = 1 to gamma(1) = 0
SCHEDULES = {
    "cosine": lambda r: torch.cos(math.pi / 2 * r),
    "linear": lambda r: 1 - r,
}
# for speed: on CPUs with bfloat16 the layers compute in it, without flash attention, whose backward
# pass is slow in it; HAS_BF16 = False is fp32
HAS_BF16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
ATTENTION = [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]
ATTENTION += [] if HAS_BF16 else [SDPBackend.FLASH_ATTENTION]


def lowest(score, n):
    """A mask (B,N) that is True at the n (B,1) lowest entries of each row of score (B,N)."""
    return score.argsort(1).argsort(1) < n  # ranks, 0 for the lowest


def mask_tokens(s, schedule="cosine"):
    """is_masked (B,N) for training: ceil(gamma(r) N) >= 1 random entries a row, r ~ U(0,1)."""
    B, N = s.shape
    # fix: TimeVQVAE's code keeps this share and masks the rest
    n_masked = (SCHEDULES[schedule](torch.rand(B, 1, device=s.device)) * N).ceil().clamp_min(1)
    return lowest(torch.rand(B, N, device=s.device), n_masked)


def masked_cross_entropy(logits, s, is_masked):
    """Mean K-way cross-entropy over the masked entries only: logits (B,N,K), s (B,N) -> scalar."""
    # fix: the thesis has binary cross-entropy over all entries; but an entry has K outcomes, and
    # known ones are in the input and teach nothing
    losses = F.cross_entropy(logits.transpose(1, 2), s, reduction="none")  # (B,N)
    return losses.where(is_masked, 0).sum() / is_masked.sum()


class MaskGIT(nn.Module):
    """Bidirectional transformer over a class token and N tokens: s_M (B,N), y (B) -> (B,N,K).

    n_classes: 0 for unlabelled data. label_dropout: probability that a label is hidden, in training
    only, which makes guidance and unconditional sampling possible. The label n_classes means none.
    """

    def __init__(self, K, N, n_classes=0, width=128, n_layers=4, n_heads=4, label_dropout=0.2):
        super().__init__()
        self.mask_id, self.no_class, self.label_dropout = K, n_classes, label_dropout
        self.tokens = nn.Embedding(K + 1, width)
        self.classes = nn.Embedding(n_classes + 1, width)
        self.positions = nn.Parameter(torch.empty(N + 1, width))
        self.layers = nn.Sequential(*(
            nn.TransformerEncoderLayer(width, n_heads, 4 * width, dropout=0.0, activation="gelu",
                                       batch_first=True, norm_first=True)
            for _ in range(n_layers)
        ))
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(K))
        for table in (self.tokens.weight, self.classes.weight, self.positions):
            nn.init.normal_(table, std=0.02)

    def forward(self, s_M, y=None):
        # follow-up: the class is an input, too, where the text has s_M alone
        if y is None:
            y = torch.full_like(s_M[:, 0], self.no_class)
        if self.training:  # fix: public code hides labels while sampling, too
            is_hidden = torch.rand(len(y), device=y.device) < self.label_dropout
            y = y.masked_fill(is_hidden, self.no_class)
        h = torch.cat([self.classes(y)[:, None], self.tokens(s_M)], 1)  # (B,1+N,width)
        with torch.autocast("cpu", torch.bfloat16, enabled=HAS_BF16), sdpa_kernel(ATTENTION):
            h = self.norm(self.layers(h + self.positions))[:, 1:]
        return h.float() @ self.tokens.weight[:-1].T + self.bias  # tied; [MASK] is no outcome


def guided(prior, y=None, scale=1.0):
    """logits_fn of a prior in eval mode, for labels y (B): l_null + scale (l_class - l_null).

    scale (1 + w of Ho and Salimans): 0 is the unconditional model, as without y, 1 the
    class-conditional one; above 1 the class shows more and variety less.
    """
    def logits_fn(s_M):
        """s_M (B,N) -> logits (B,N,K)."""
        if y is None or scale == 1:
            return prior(s_M, y)
        l_class, l_null = prior(s_M, y), prior(s_M)
        return l_null + scale * (l_class - l_null)

    return logits_fn


def gumbel_like(x):
    """Standard Gumbel noise in the shape of x."""
    return -torch.empty_like(x).exponential_().log()


def draw(log_p, temperature):
    """Tokens (B,N) of log_p (B,N,K), drawn at this temperature; 0 takes the likeliest."""
    return (log_p + temperature * gumbel_like(log_p)).argmax(-1)


def log_p_of(s, log_p):
    """Log-probability (B,N) that log_p (B,N,K) gives to each token of s (B,N)."""
    return log_p.gather(2, s[..., None])[..., 0]


@torch.no_grad()
def decode(logits_fn, s_M, mask_id, n_steps=10, temperature=1.0, choice_temperature=4.5):
    """Fill the entries of s_M (B,N) that equal mask_id, the surest first (thesis 0.2.2).

    Step t of T = n_steps reads s_M^(t-1), draws every masked entry from its own distribution
    at this temperature, scores each draw by its log-probability (at temperature 1) plus Gumbel
    noise times choice_temperature (1 - t/T), and masks the floor(gamma(t/T) n) lowest again, where
    n is the number masked at first. Known entries stay; at least one entry is settled a step.
    """
    n = (s_M == mask_id).sum(1, keepdim=True)  # (B,1)
    for t in range(1, n_steps + 1):
        is_masked = s_M == mask_id
        log_p = logits_fn(s_M).log_softmax(-1)
        drawn = draw(log_p, temperature)
        score = log_p_of(drawn, log_p)
        # follow-up: noise, where the text keeps the most confident (4.5: MaskGIT's code)
        score = score + choice_temperature * (1 - t / n_steps) * gumbel_like(score)
        # floor, as MaskGIT's code (its paper: ceil); float64, as fp32 rounds some counts down by 1
        gamma = SCHEDULES["cosine"](torch.tensor(t / n_steps, dtype=torch.float64))
        n_left = (gamma * n).floor().minimum(is_masked.sum(1, keepdim=True) - 1)
        is_left = lowest(score.where(is_masked, math.inf), n_left)
        s_M = s_M.where(~is_masked, drawn).masked_fill(is_left, mask_id)
    return s_M


@torch.no_grad()
def revise(logits_fn, s, is_given, mask_id, n_rounds=10, share=0.6, temperature=1.0,
           choice_temperature=0.5):
    """Draw entries of s (B,N) anew, in n_rounds of one pass each, but none where is_given (B,N).

    Round i, from 0, masks share (1 - i/n_rounds), rounded, of the entries not given, those lowest
    in margin plus Gumbel noise times choice_temperature, and draws them anew. The margin is
    the token's log-probability plus the entropy of its distribution: below 0 where the token is
    less likely than a draw is on average; so what is uncertain anyway is not singled out, which
    would cost variety. It comes from the pass of the round before, in which an entry that was not
    masked sees itself, too; in the first round the Gumbel noise alone decides.
    """
    # addition: MaskGIT never looks back; without (--rounds 0) .06 fewer series are well-formed
    n, margin = (~is_given).sum(1, keepdim=True), torch.zeros(s.shape, device=s.device)
    for i in range(n_rounds):
        score = (margin + choice_temperature * gumbel_like(margin)).where(~is_given, math.inf)
        is_masked = lowest(score, (share * (1 - i / n_rounds) * n).round())
        log_p = logits_fn(s.masked_fill(is_masked, mask_id)).log_softmax(-1)
        s = s.where(~is_masked, draw(log_p, temperature))
        margin = log_p_of(s, log_p) + torch.special.entr(log_p.exp()).sum(-1)
    return s


@torch.no_grad()
def nll_bound(logits_fn, s, mask_id):
    """One-draw estimate (B) of an upper bound on -log p(s) of each row of s (B,N), in nats.

    p is conditioned on what logits_fn is, as on labels. With n_masked, uniform on 1..N, random
    entries masked, N/n_masked times their summed cross-entropy is, on average, the negative
    log-likelihood of generating one entry at a time, averaged over all orders, which bounds that of
    the mixture of orders (Uria et al. 2014).
    """
    B, N = s.shape
    n_masked = torch.randint(1, N + 1, (B,), device=s.device)
    is_masked = lowest(torch.rand(B, N, device=s.device), n_masked[:, None])
    log_p = logits_fn(s.masked_fill(is_masked, mask_id)).log_softmax(-1)
    return -log_p_of(s, log_p).where(is_masked, 0).sum(1) * N / n_masked
