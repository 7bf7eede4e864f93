"""VQ-VAE on the time-frequency plane of a series (stage 1; thesis 0 and 0.1).

    stft, istft        x (B,C,L) <-> u (B,2C,H,W)
    ResidualBlock      the unit of encoder and decoder
    VectorQuantizer    z -> z_q and s, a codebook learned by exponential moving average
    perplexity         of the use of codes
    VQVAE              all of it: x -> x^; encode, decode, tokenize, detokenize; its noise floor

Papers: van den Oord et al. 2017, "Neural Discrete Representation Learning" (VQ-VAE); Lee et al.
2023, "Vector Quantized Time Series Generation with a Bidirectional Prior Model" (for thesis 0.1).

Notation: B batch, C channels, L series length, H x W STFT bins x frames, H' x W' latent grid,
N = H'W' tokens, D latent width, K codes; x series (B,C,L), u its STFT (B,2C,H,W),
z encoder output (B,D,H',W'), z_q quantized z, s token indices (B,N) in 0..K-1.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, reduce


def stft(x, n_fft=8, hop=2):
    """Short-time Fourier transform, real and imaginary parts as channels: (B,C,L) -> (B,2C,H,W).

    Hann window, centred frames over a reflected border, not normalised: H = n_fft/2 + 1 bins,
    W = L//hop + 1 frames; L > n_fft/2. Always fp32, as complex half precision is unreliable.
    """
    window = torch.hann_window(n_fft, device=x.device)
    u = torch.stft(x.float().flatten(0, 1), n_fft, hop, window=window, return_complex=True)
    return rearrange(torch.view_as_real(u), "(b c) h w part -> b (c part) h w", b=len(x))


def istft(u, length, n_fft=8, hop=2):
    """Inverse of `stft`: (B,2C,H,W) -> (B,C,length), as W alone leaves `hop` lengths possible.

    torch.istft without its check for zero windows, a wait for the GPU: so n_fft >= 2 hop.
    """
    window = torch.hann_window(n_fft, device=u.device)[:, None]
    parts = rearrange(u.float(), "b (c part) h w -> (b c) h w part", part=2).contiguous()
    frames = torch.fft.irfft(torch.view_as_complex(parts), n_fft, dim=1) * window  # (BC,n_fft,W)

    def overlap_add(frames):
        """(rows,n_fft,W) -> (rows,length), without the border that stft has reflected."""
        image = frames.flatten(0, 1)  # rows as channels of one, which a GPU folds in one kernel
        whole = (1, (frames.shape[2] - 1) * hop + n_fft)
        x = F.fold(image, whole, (1, n_fft), stride=(1, hop))[:, 0]
        return x[:, n_fft // 2 :][:, :length]

    x = overlap_add(frames) / overlap_add(window.square().expand_as(frames[:1]))
    return rearrange(x, "(b c) l -> b c l", b=len(u))


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


def no_autocast(device):
    """Context without autocast, as codes are chosen and averaged in full precision."""
    return torch.autocast(device.type.replace("meta", "cpu"), enabled=False)  # meta has none


class VectorQuantizer(nn.Module):
    """Nearest-code quantizer, learned by moving averages (VQ-VAE, appendix A.1).

    `codebook` (K,D) equals `sums` / `counts`, the averaged sum and number of the latents that chose
    each code; `decay`, in (0,1), is the share of the old average kept a step. Counts start
    at 0, so `revive` places all codes on the first training batch. Eval mode updates nothing.
    """

    def __init__(self, K=32, D=64, decay=0.9):
        super().__init__()
        self.decay = decay
        self.register_buffer("counts", torch.zeros(K))
        self.register_buffer("sums", torch.zeros(K, D))
        self.register_buffer("codebook", torch.zeros(K, D))

    def distances(self, z):
        """Squared Euclidean distance of each latent to each code: (B,D,H',W') -> (B,N,K), fp32."""
        with no_autocast(z.device):
            z = rearrange(z.float(), "b d h w -> b (h w) d")
            cross = z @ self.codebook.T
            return z.square().sum(-1, keepdim=True) - 2 * cross + self.codebook.square().sum(-1)

    def lookup(self, s, grid):
        """Code vectors of tokens: s (B,N), grid (H',W') -> z_q (B,D,H',W')."""
        return rearrange(self.codebook[s], "b (h w) d -> b d h w", h=grid[0])

    @torch.no_grad()
    def revive(self, latents):
        """Move codes counted under 1 % of a fair share, B*N/K, onto random latents (B*N,D)."""
        # fix: public code moves the code alone; its stale sum and count then drag it back
        K, fair_share = len(self.codebook), len(latents) / len(self.codebook)
        is_unused = self.counts < 0.01 * fair_share
        drawn = latents[torch.randint(len(latents), (K,), device=latents.device)]
        self.codebook.copy_(torch.where(is_unused[:, None], drawn, self.codebook))
        self.sums.copy_(torch.where(is_unused[:, None], drawn * fair_share, self.sums))
        self.counts.masked_fill_(is_unused, fair_share)

    @torch.no_grad()
    def update(self, latents, s):
        """One moving-average step from latents (B*N,D) and the tokens s (B*N) that they chose."""
        chosen = F.one_hot(s, len(self.codebook)).to(latents.dtype)  # (B*N,K)
        with no_autocast(latents.device):
            sums = chosen.T @ latents
        self.counts.lerp_(chosen.sum(0), 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.codebook.copy_(self.sums / self.counts[:, None])

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
        if self.training:
            self.update(latents, s.flatten())
        return z + (z_q - z).detach(), s, F.mse_loss(z, z_q)


def perplexity(counts):
    """exp(entropy) of code use: counts (K) -> scalar from 1 (one code) to K (all alike)."""
    p = counts / counts.sum()
    return torch.special.entr(p).sum().exp()


class VQVAE(nn.Module):
    """Encoder, quantizer and decoder over the STFT of series of one length.

    The encoder halves time until W' is near `columns` and keeps all H bins; the decoder mirrors it.
    L >= n_fft >= 2 hop, n_fft even. `grid` is (H',W'), `stride` the samples of a column, but the
    last one also has what the halvings leave over.
    """

    # follow-up: D, K, and the weight 1 of the commitment loss
    def __init__(self, L, C=1, D=64, K=32, n_fft=8, hop=2, decay=0.9, n_blocks=4, columns=8):
        super().__init__()
        self.L, self.n_fft, self.hop = L, n_fft, hop
        H, W = n_fft // 2 + 1, L // hop + 1
        n_halvings = max(0, round(math.log2(W / columns)))
        self.grid, self.stride = (H, W // 2**n_halvings), hop * 2**n_halvings

        along_time = dict(kernel_size=(3, 4), stride=(1, 2), padding=1)
        down, up = [], []
        for i in range(n_halvings):  # from the outermost inwards
            channels = D if i else 2 * C
            if i:
                down += [nn.BatchNorm2d(D), nn.ReLU()]
            down += [nn.Conv2d(channels, D, **along_time)]
            odd = (0, W // 2**i % 2)  # half an odd width is rounded down: add the frame back
            upsample = nn.ConvTranspose2d(D, channels, output_padding=odd, **along_time)
            up = [nn.BatchNorm2d(D), nn.ReLU(), upsample, *up]
        down = down or [nn.Conv2d(2 * C, D, 3, padding=1)]  # short series: no halving
        up = up or [nn.BatchNorm2d(D), nn.ReLU(), nn.Conv2d(D, 2 * C, 3, padding=1)]
        self.encoder = nn.Sequential(*down, *(ResidualBlock(D) for _ in range(n_blocks)))
        self.quantizer = VectorQuantizer(K, D, decay)
        self.decoder = nn.Sequential(*(ResidualBlock(D) for _ in range(n_blocks)), *up)
        self.register_buffer("noise_floor", torch.zeros(C, H, K))

    def stft(self, x):
        """x (B,C,L) -> u (B,2C,H,W) with this model's window."""
        return stft(x, self.n_fft, self.hop)

    def encode(self, x):
        """x (B,C,L) -> z (B,D,H',W')."""
        return self.encoder(self.stft(x))

    def decode(self, z_q):
        """z_q or z (B,D,H',W') -> x^ (B,C,L), u^ (B,2C,H,W)."""
        u_hat = self.decoder(z_q)
        return istft(u_hat, self.L, self.n_fft, self.hop), u_hat

    def forward(self, x):
        """x (B,C,L) -> x^ (B,C,L), u^ (B,2C,H,W), s (B,N), commitment loss: the autoencoder."""
        z_q, s, commitment = self.quantizer(self.encode(x))
        x_hat, u_hat = self.decode(z_q)
        return x_hat, u_hat, s, commitment

    def tokenize(self, x):
        """x (B,C,L) -> s (B,N), row by row over the grid. Call in eval mode."""
        return self.quantizer.distances(self.encode(x)).argmin(-1)

    def detokenize(self, s):
        """s (B,N) -> x^ (B,C,L). Call in eval mode."""
        return self.decode(self.quantizer.lookup(s, self.grid))[0]

    # addition: white noise that x has and x^ lacks goes into drawn series; a classifier taught by
    # them is right on .86 of noisy real ones, without it (sample.py --noise 0) on .29

    @torch.no_grad()
    def fit_noise_floor(self, x, rare=10):
        """Set `noise_floor` (C,H,K) from series x (n,C,L). Call in eval mode.

        Entry (c,h,k) is the deviation of white noise whose power in bin h is the excess, if
        positive, of |stft(x)|^2 over |stft(x^)|^2, a mean of the cells of bin h with code k and of
        `rare` made-up ones at the median of the bin's codes (a mean passes one outlier on to all).
        """
        K = len(self.quantizer.codebook)
        total = torch.zeros_like(self.noise_floor)
        count = torch.zeros_like(total[0])  # (H,K)
        for rows in x.split(100):
            s = self.tokenize(rows)
            power, power_hat = (  # |u|^2, |u^|^2 (B,C,H,W)
                reduce(self.stft(v).square(), "b (c part) h w -> b c h w", "sum", part=2)
                for v in (rows, self.detokenize(s)))
            # (B,C,H,W'), of a column's own frames, without those that halvings drop at the end
            excess = F.avg_pool2d(power - power_hat, (1, self.stride // self.hop))
            chosen = F.one_hot(s.view(-1, *self.grid), K).float()  # (B,H,W',K)
            total += torch.einsum("bchw,bhwk->chk", excess, chosen)
            count += chosen.sum((0, 2))
        typical = (total / count).nanmedian(-1, keepdim=True).values
        of_white_noise = torch.hann_window(self.n_fft).square().sum()  # in a bin, for variance 1
        variance = (total + rare * typical) / (count + rare) / of_white_noise
        self.noise_floor.copy_(variance.clamp_min(0).sqrt())

    def noise(self, s):
        """s (B,N) -> white noise (B,C,L), alike in all bins, so of a column's lowest floor."""
        bins = torch.arange(self.grid[0], device=s.device)[:, None]
        deviation = self.noise_floor[:, bins, s.view(-1, *self.grid)]  # (C,B,H,W')
        deviation = deviation.amin(2).transpose(0, 1)  # (B,C,W')
        deviation = F.pad(deviation, (0, 1), mode="replicate")  # for samples after the last column
        deviation = F.interpolate(deviation, scale_factor=self.stride, mode="linear")[..., : self.L]
        return deviation * torch.randn_like(deviation)
