"""VQ-VAE on the time-frequency plane of a series (stage 1; thesis 0 and 0.1).

    stft, istft        x (B,C,L) <-> u (B,2C,H,W)
    ResidualBlock      the unit of encoder and decoder
    VectorQuantiser    z -> z_q and s, codes learned by exponential moving average
    VQVAE              all of it: encode, decode, tokenise, detokenise

Papers: van den Oord et al. 2017, "Neural Discrete Representation Learning" (VQ-VAE and, in its
appendix A.1, the moving-average code book); Lee et al. 2023, "Vector Quantized Time Series
Generation with a Bidirectional Prior Model" (TimeVQVAE, which fills the empty heading 0.1).

Notation: B batch, C channels, L series length, H x W STFT bins x frames, H' x W' latent grid,
N = H'W' tokens, D latent width, K codes; x series (B,C,L), u its STFT (B,2C,H,W),
z encoder output (B,D,H',W'), z_q quantised z, s token indices (B,N) in 0..K-1.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange


def stft(x, n_fft=8, hop=2):
    """Short-time Fourier transform, real and imaginary parts as channels: (B,C,L) -> (B,2C,H,W).

    Hann window, centred frames over a reflected border, not normalised: H = n_fft/2 + 1 bins,
    W = L//hop + 1 frames. Always fp32, as complex numbers have no half precision to rely on.
    """
    window = torch.hann_window(n_fft, device=x.device)
    u = torch.stft(x.float().flatten(0, 1), n_fft, hop, window=window, return_complex=True)
    return rearrange(torch.view_as_real(u), "(b c) h w part -> b (c part) h w", b=len(x))


def istft(u, length, n_fft=8, hop=2):
    """Inverse of `stft`: (B,2C,H,W) -> (B,C,length); W alone does not tell even from odd.

    Windowed frames are added where they overlap and divided by the sum of the squared windows: what
    torch.istft does, but without its look whether that sum is zero anywhere, for which a GPU has to
    wait. Needs hop <= n_fft/2.
    """
    window = torch.hann_window(n_fft, device=u.device)[:, None]
    parts = rearrange(u.float(), "b (c part) h w -> (b c) h w part", part=2).contiguous()
    frames = torch.fft.irfft(torch.view_as_complex(parts), n_fft, dim=1) * window  # (BC,n_fft,W)

    def overlap_add(frames):
        """(rows,n_fft,W) -> (rows,1,1,length), without the border that stft has reflected."""
        size = n_fft + hop * (frames.shape[-1] - 1)
        x = F.fold(frames, (1, size), (1, n_fft), stride=(1, hop))
        return x[..., n_fft // 2 :][..., :length]

    x = overlap_add(frames) / overlap_add(window.square().expand_as(frames[:1]))
    return rearrange(x, "(b c) 1 1 l -> b c l", b=len(u))


class ResidualBlock(nn.Module):
    """A 3 x 3 and a 1 x 1 convolution, each after batch norm and ReLU, beside an identity."""

    def __init__(self, D):
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(D), nn.ReLU(), nn.Conv2d(D, D, 3, padding=1, bias=False),
            nn.BatchNorm2d(D), nn.ReLU(), nn.Conv2d(D, D, 1),
        )

    def forward(self, z):
        return z + self.layers(z)


class VectorQuantiser(nn.Module):
    """Nearest-code quantiser, learned by moving averages (VQ-VAE, appendix A.1).

    `codes` (K,D) always equals `sums` / `counts`, the averaged sum and number of the latents that
    chose each code. A code that almost nothing chooses is moved onto a random latent of the batch
    together with its sum and count, so that the next average does not drag it back. Counts start
    at zero, so the first training batch places every code by that same rule; until then all are 0.

    decay: share of the old average kept a step. In eval mode no buffer changes.
    """

    def __init__(self, K=32, D=64, decay=0.9):
        super().__init__()
        self.decay = decay
        self.register_buffer("counts", torch.zeros(K))
        self.register_buffer("sums", torch.zeros(K, D))
        self.register_buffer("codes", torch.zeros(K, D))

    def distances(self, z):
        """Squared Euclidean distance of each latent to each code: (B,D,H',W') -> (B,N,K), fp32."""
        with torch.autocast(z.device.type, enabled=False):
            z = rearrange(z.float(), "b d h w -> b (h w) d")
            cross = z @ self.codes.T
            return z.square().sum(-1, keepdim=True) - 2 * cross + self.codes.square().sum(-1)

    def forward(self, z):
        """z (B,D,H',W') -> z_q of the same shape, s (B,N), commitment loss (scalar).

        The gradient of z_q passes to z unchanged (straight-through); codes get none, they follow
        the averages. The commitment loss ||z - sg(z_q)||^2 is averaged over all entries.
        """
        z = z.float()
        latents = rearrange(z.detach(), "b d h w -> (b h w) d")
        if self.training:
            self.revive(latents)
        s = self.distances(z.detach()).argmin(-1)
        z_q = self.lookup(s, z.shape[-2:])
        # NOTE(differs): VQ-VAE's paper weighs this by 0.25 and has a decay of 0.99
        commitment = F.mse_loss(z, z_q)
        if self.training:
            self.update(latents, s.flatten())
        return z + (z_q - z).detach(), s, commitment

    def lookup(self, s, grid):
        """Code vectors of tokens: s (B,N), grid (H',W') -> z_q (B,D,H',W')."""
        return rearrange(self.codes[s], "b (h w) d -> b d h w", h=grid[0])

    @torch.no_grad()
    def revive(self, latents):
        """Move codes whose count is under 1 % of a fair share, B*N/K, onto random latents (B*N,D).

        A revived code starts with the count of a fair share: about 44 steps (at decay 0.9) pass
        before it can be moved again.
        """
        # NOTE(differs): where only the code is moved, its stale sum and count drag it back
        K, fair_share = len(self.codes), len(latents) / len(self.codes)
        unused = self.counts < 0.01 * fair_share
        drawn = latents[torch.randint(len(latents), (K,), device=latents.device)]
        self.codes[:] = torch.where(unused[:, None], drawn, self.codes)
        self.counts.masked_fill_(unused, fair_share)
        self.sums[:] = torch.where(unused[:, None], drawn * fair_share, self.sums)

    @torch.no_grad()
    def update(self, latents, s):
        """One moving-average step from latents (B*N,D) and the tokens s (B*N) that they chose."""
        hits = torch.zeros_like(self.counts).index_add_(0, s, torch.ones_like(latents[:, 0]))
        self.counts.lerp_(hits, 1 - self.decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, s, latents), 1 - self.decay)
        self.codes[:] = self.sums / self.counts[:, None]


def perplexity(counts):
    """exp(entropy) of code use: counts (K) -> scalar from 1 (one code) to K (all alike)."""
    p = counts / counts.sum()
    return torch.special.entr(p).sum().exp()


class VQVAE(nn.Module):
    """Encoder, quantiser and decoder over the STFT of series of one length.

    The encoder halves time until about `target_width` columns are left and keeps all H bins; the
    decoder mirrors it and has C more channels, for the deviation of x from x^. L >= n_fft.
    """

    def __init__(self, L, C=1, D=64, K=32, n_fft=8, hop=2, decay=0.9, n_blocks=4, target_width=8):
        super().__init__()
        if L < n_fft:
            raise ValueError(f"series of length {L}: at least {n_fft} samples are needed")
        self.L, self.C, self.n_fft, self.hop = L, C, n_fft, hop
        H, W = n_fft // 2 + 1, L // hop + 1
        n_halvings = max(0, round(math.log2(W / target_width)))
        widths = [W // 2**i for i in range(n_halvings + 1)]
        self.grid = (H, widths[-1])  # (H',W')
        self.stride = hop * 2**n_halvings  # samples from one column of the grid to the next

        along_time = dict(kernel_size=(3, 4), stride=(1, 2), padding=1)
        down, up = [], []
        for i in range(n_halvings):  # from the outermost inwards
            inputs, outputs = (D, D) if i else (2 * C, 3 * C)
            down += [nn.BatchNorm2d(D), nn.ReLU()] if i else []  # none before the first
            down += [nn.Conv2d(inputs, D, **along_time)]
            odd = (0, widths[i] % 2)  # a halving drops an odd width's last column: put it back
            back = nn.ConvTranspose2d(D, outputs, output_padding=odd, **along_time)
            up = [nn.BatchNorm2d(D), nn.ReLU(), back, *up]
        down = down or [nn.Conv2d(2 * C, D, 3, padding=1)]  # short series: no halving
        up = up or [nn.BatchNorm2d(D), nn.ReLU(), nn.Conv2d(D, 3 * C, 3, padding=1)]
        self.encoder = nn.Sequential(*down, *(ResidualBlock(D) for _ in range(n_blocks)))
        self.quantiser = VectorQuantiser(K, D, decay)
        self.decoder = nn.Sequential(*(ResidualBlock(D) for _ in range(n_blocks)), *up)

    def stft(self, x):
        """x (B,C,L) -> u (B,2C,H,W) with this model's window."""
        return stft(x, self.n_fft, self.hop)

    def encode(self, x):
        """x (B,C,L) -> z (B,D,H',W')."""
        return self.encoder(self.stft(x))

    def decode(self, z_q):
        """z_q or z (B,D,H',W') -> x^ (B,C,L), u^ (B,2C,H,W), log_deviation (B,C,L) of x from x^."""
        u_hat, spread = self.decoder(z_q).split([2 * self.C, self.C], 1)
        # NOTE(differs): other decoders give x^ alone; log d is C more channels, averaged over the
        # bins and stretched from W frames to L samples; d is at least exp(-4.5) = .011
        log_deviation = F.interpolate(spread.mean(2), self.L, mode="linear", align_corners=True)
        return istft(u_hat, self.L, self.n_fft, self.hop), u_hat, log_deviation.clamp_min(-4.5)

    def tokenise(self, x):
        """x (B,C,L) -> s (B,N), row by row over the grid. Call in eval mode."""
        return self.quantiser.distances(self.encode(x)).argmin(-1)

    def detokenise(self, s, noise=0.0):
        """s (B,N) -> x^ + noise * deviation * N(0,1), (B,C,L). Call in eval mode."""
        x_hat, _, log_deviation = self.decode(self.quantiser.lookup(s, self.grid))
        return x_hat + noise * log_deviation.exp() * torch.randn_like(x_hat)
